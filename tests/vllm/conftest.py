import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # in GiB
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that a test can look into the model
