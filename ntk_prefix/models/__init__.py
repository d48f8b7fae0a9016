"""Pretrained backbones in Flax NNX, from Hugging Face folders, GGUF and ONNX: encoders of text and images, and decoders.

>>> model = models.from_pretrained("all-MiniLM-L6-v2")                          # a Hugging Face folder
>>> model(input_ids, attention_mask).last_hidden_state                          # [B, T, D]
>>> model.remat = True                                                          # see RunOptions
>>> model = models.from_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf", "causal-lm")
>>> models.generate(model, input_ids, attention_mask, max_new_tokens=32, eos_token_id=2)
>>> models.generate(model, input_ids, sampling=models.Sampling(top_p=0.9), key=jax.random.key(0), samples=10)   # [B, 10, 32]

Why these are our own: every attention layer needs one exchangeable core (:mod:`.attention`), under one name in text,
images and language models, and no kept JAX library offers that. transformers has dropped Flax; jax-ml/bonsai is a
collection of examples to copy (no BERT, nothing on the package index); jax-image-models has ViT only, around
flax's own attention; EasyDeL and MaxText are whole training stacks around attention of theirs.

Classes have a help of their own, ``help(models.Llama)``:

- models, each with its configuration: ``Bert``, ``DistilBert``, ``Llama``, ``ModernBert``, ``Roberta``, ``T5Encoder``, ``Vit``;
  ``BertConfig``, ``DistilBertConfig``, ``LlamaConfig``, ``ModernBertConfig``, ``RobertaConfig``, ``T5Config``, ``VitConfig``;
- around them: ``Classifier``, ``Ranker``, ``Output``, ``RunOptions``, ``Sampling``, ``ImageNormalization``;
- their parts: ``Backbone``, ``AttentionLayer``, ``AttentionCore``, ``AttentionKind``, ``AttentionOptions``, ``KeyValueCache``,
  ``LeadingRows``, ``Rope``, ``Rotary``.
"""

from ntk_prefix.models.attention import AttentionCore as AttentionCore
from ntk_prefix.models.attention import AttentionKind as AttentionKind
from ntk_prefix.models.attention import AttentionLayer as AttentionLayer
from ntk_prefix.models.attention import AttentionOptions as AttentionOptions
from ntk_prefix.models.attention import KeyValueCache as KeyValueCache
from ntk_prefix.models.backbone import Backbone as Backbone
from ntk_prefix.models.backbone import LeadingRows as LeadingRows
from ntk_prefix.models.backbone import Output as Output
from ntk_prefix.models.backbone import RunOptions as RunOptions
from ntk_prefix.models.bert import Bert as Bert
from ntk_prefix.models.bert import BertConfig as BertConfig
from ntk_prefix.models.classifier import Classifier as Classifier
from ntk_prefix.models.families.distilbert import DistilBert as DistilBert
from ntk_prefix.models.families.distilbert import DistilBertConfig as DistilBertConfig
from ntk_prefix.models.families.modernbert import ModernBert as ModernBert
from ntk_prefix.models.families.modernbert import ModernBertConfig as ModernBertConfig
from ntk_prefix.models.families.roberta import Roberta as Roberta
from ntk_prefix.models.families.roberta import RobertaConfig as RobertaConfig
from ntk_prefix.models.families.t5 import T5Config as T5Config
from ntk_prefix.models.families.t5 import T5Encoder as T5Encoder
from ntk_prefix.models.formats import gguf_chat_template, gguf_tokenizer, local_files, pinned
from ntk_prefix.models.generation import generate
from ntk_prefix.models.llama import Llama as Llama
from ntk_prefix.models.llama import LlamaConfig as LlamaConfig
from ntk_prefix.models.loading import from_pretrained, module_aliases, module_names
from ntk_prefix.models.preprocessing import ImageNormalization as ImageNormalization
from ntk_prefix.models.preprocessing import image_normalization, load_tokenizer
from ntk_prefix.models.ranker import Ranker as Ranker
from ntk_prefix.models.ranker import load_ranker
from ntk_prefix.models.rotary import Rope as Rope
from ntk_prefix.models.rotary import Rotary as Rotary
from ntk_prefix.models.sampling import Sampling as Sampling
from ntk_prefix.models.vit import Vit as Vit
from ntk_prefix.models.vit import VitConfig as VitConfig

# without classes, as in ntk_prefix/__init__.py
__all__ = [
    "from_pretrained",
    "generate",
    "gguf_chat_template",
    "gguf_tokenizer",
    "image_normalization",
    "load_ranker",
    "load_tokenizer",
    "local_files",
    "module_aliases",
    "module_names",
    "pinned",
]
