"""The vLLM plugin. Every vLLM process loads it, so it imports a model only when one is asked for."""

ARCHITECTURES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


def register() -> None:
    """Replace vLLM's own models by those of `neuroflow.serve.vllm`, as far as this release of vLLM has them.

    vLLM calls it through the entry point `vllm.general_plugins`.

    Raises:
        ImportError: vLLM is not installed.

    Example:
        >>> from neuroflow.serve.vllm_plugin import register
        >>> register()  # doctest: +SKIP
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        if name in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"neuroflow.serve.vllm:{name}")
