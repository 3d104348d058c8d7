"""The plugin of vLLM, which every of its processes loads: it imports no model before one is asked for."""

ARCHITECTURES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


def register() -> None:
    """Put `neuroflow.serve.vllm`'s models in the place of vLLM's own, as far as this release has them."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        if name in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"neuroflow.serve.vllm:{name}")
