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
"""

from ntk_prefix.models.attention import AttentionCore, AttentionKind, AttentionLayer, AttentionOptions, KeyValueCache
from ntk_prefix.models.backbone import Backbone, LeadingRows, Output, RunOptions
from ntk_prefix.models.bert import Bert, BertConfig
from ntk_prefix.models.classifier import Classifier
from ntk_prefix.models.families.distilbert import DistilBert, DistilBertConfig
from ntk_prefix.models.families.modernbert import ModernBert, ModernBertConfig
from ntk_prefix.models.families.roberta import Roberta, RobertaConfig
from ntk_prefix.models.families.t5 import T5Config, T5Encoder
from ntk_prefix.models.formats import gguf_chat_template, gguf_tokenizer, local_files, pinned
from ntk_prefix.models.generation import generate
from ntk_prefix.models.llama import Llama, LlamaConfig
from ntk_prefix.models.loading import from_pretrained, module_aliases, module_names
from ntk_prefix.models.preprocessing import ImageNormalization, image_normalization, load_tokenizer
from ntk_prefix.models.ranker import Ranker, load_ranker
from ntk_prefix.models.rotary import Rope, Rotary
from ntk_prefix.models.sampling import Sampling
from ntk_prefix.models.vit import Vit, VitConfig

__all__ = [
    "AttentionCore",
    "AttentionKind",
    "AttentionLayer",
    "AttentionOptions",
    "Backbone",
    "Bert",
    "BertConfig",
    "Classifier",
    "DistilBert",
    "DistilBertConfig",
    "ImageNormalization",
    "KeyValueCache",
    "LeadingRows",
    "Llama",
    "LlamaConfig",
    "ModernBert",
    "ModernBertConfig",
    "Output",
    "Ranker",
    "Roberta",
    "RobertaConfig",
    "Rope",
    "Rotary",
    "RunOptions",
    "Sampling",
    "T5Config",
    "T5Encoder",
    "Vit",
    "VitConfig",
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
