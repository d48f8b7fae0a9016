"""One file per method, or per family of them; one line here for each configuration, and all else learns of it."""

from ntk_prefix.peft.base import AdapterConfig
from ntk_prefix.peft.head import HeadConfig as HeadConfig
from ntk_prefix.peft.methods.lora import LoraConfig as LoraConfig
from ntk_prefix.peft.methods.ntk_attention import NTKAttentionConfig as NTKAttentionConfig
from ntk_prefix.peft.methods.ntk_attention import PrefixTuningPlusConfig as PrefixTuningPlusConfig
from ntk_prefix.peft.methods.prefix_propagation import PrefixPropagationConfig as PrefixPropagationConfig
from ntk_prefix.peft.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from ntk_prefix.peft.methods.weights import BitFitConfig as BitFitConfig
from ntk_prefix.peft.methods.weights import FullConfig as FullConfig

METHODS: dict[str, type[AdapterConfig]] = {
    kind.method: kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, AdapterConfig) and kind is not AdapterConfig
}
"""Configurations by the names that files use."""

PRESETS: dict[str, tuple[AdapterConfig, ...]] = {
    name: configs for kind in METHODS.values() for name, configs in kind.presets().items()
}
"""What is trained by default under the names that the command line and the tables use."""
