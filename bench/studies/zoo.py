"""Which models of the installed transformers `enable_cache` accepts: `python -m bench.studies.zoo [NAME ...]`.

Builds every class of transformers' auto-mappings that takes images or video, small and with random weights, each in a
process of its own, and passes each vision tower in it to `enable_cache`.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import re
import textwrap
import time
import warnings
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import huggingface_hub.constants
import neuroflow
import torch
import transformers
from neuroflow.adapters import towers
from transformers.models.auto import modeling_auto

from bench.tables import RESULTS, begin, share, table, write

SECONDS, AT_ONCE = 60, 2
# Mappings of which every class is tried; of the others, classes that take pixels.
OF_IMAGES = re.compile("IMAGE|VISUAL|VIDEO|SEGMENT|DETECT|ESTIMATION|KEYPOINT|BACKBONE|MASK_GENERATION|_RECOGNITION")
PIXELS, WORDS = re.compile("pixel|image|flattened_patches"), re.compile("input_(ids|features|values)|query_embeds")
# Parts of a configuration that are no vision tower.
NO_TOWER = re.compile(
    "text|^audio_config|protein|multimodal|decoder|detr_|head|former|prompt|perceiver|geometry|adapter|reading"
    "|talker|code_|dit_|wav|bigvgan"
)
# What becomes of a class, and what the table says of those.
ABOUT = {
    "accepted": "by which family",
    "refused": "reason",
    "no plain ViT": "what it is",
    "not built": "error",
}
VERDICTS = tuple(ABOUT)

WIDTH, HEADS, GRID, VOCABULARY = 64, 4, 8, 1000
DEPTHS = {"vision": 4, "text": 2}
# What makes a configuration that of a pyramid, of the sizes that it has.
PYRAMID = re.compile("depths|hidden_sizes|blocks_per_stage|stage_(?!names).*|block_configs")
DEPTH = re.compile("(num_)?(hidden_|spatial_|temporal_|auxiliary_)?layers|depth|n_layers?|(en|de)coder_layers")
INDICES = re.compile("((backbone_)?out|deepstack_visual|.*intermediate.*)_ind(ic|ex)es|extract_layers")
# Fields by name -> what they become. Where a value is smaller it stays.
SIZES = {
    "((text|vision|out|encoder|projection|projector|reassemble|image_text)_)?hidden_size|d_model|n_embd": WIDTH,
    "hidden_dim|embed_dim|(vision_)?output_dim|projection_(dim|size|hidden_dim)": WIDTH,
    "(pooler_output|embedding|word_embed_proj|adapter_in)_(size|dim)": WIDTH,
    "(.*_)?intermediate_(size|dim)|mlp_dim|((en|de)coder_)?ffn_dim|d_ff": 2 * WIDTH,
    "((swa_)?num_|(en|de)coder_)?(attention_)?heads|n_head|(swa_)?num_key_value_heads": HEADS,
    "((swa|v|qk_nope|qk_rope)_)?head_dim|d_kv": WIDTH // HEADS,
    "qk_head_dim|(q|kv)_lora_rank": 2 * WIDTH // HEADS,
    "(moe_)?num_(local_)?experts|n_routed_experts": 4,
    "num_experts_per_tok|moe_(top)?k": 2,
    "n_group|topk_group": 1,
    "(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    "hidden_size_per_layer_input|laurel_rank": WIDTH // HEADS,
}


def mappings():
    """Every class that may hold a vision tower -> (its model types, its mappings), both lists of names."""
    found = {}
    for attribute in sorted(vars(modeling_auto)):
        match = re.fullmatch("MODEL_(?:FOR_)?(?:(.*)_)?MAPPING_NAMES", attribute)
        for kind, names in getattr(modeling_auto, attribute).items() if match else ():
            for name in (names,) if isinstance(names, str) else names:
                if takes_pixels(name) or name in found or OF_IMAGES.search(attribute):
                    kinds, of = found.setdefault(name, ({}, {}))
                    kinds[kind] = of[(match[1] or "model").lower().replace("_", " ")] = None
    return {name: (list(kinds), list(of)) for name, (kinds, of) in sorted(found.items())}


def takes_pixels(name):
    try:
        model = getattr(transformers, name)
        names = inspect.signature(model.forward).parameters
    except (ImportError, AttributeError):  # it needs a library that is not there, or is no class of this release
        return False
    modalities = getattr(model, "input_modalities", ())
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    seen = modalities & {"image", "video"}
    return any(map(PIXELS.search, names)) or (bool(seen) and (seen == modalities or not any(map(WORDS.search, names))))


def tiny_config(model_class, kind):
    """The default configuration of a class, made small."""
    if kind == "vision-encoder-decoder":
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(), transformers.BertConfig()
        )
    elif kind == "vision-text-dual-encoder":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(), transformers.BertConfig()
        )
    else:
        config = (model_class.config_class or transformers.CONFIG_MAPPING[kind])()
    for part, name in PARTS.get(kind, {}).items():
        setattr(config, part, transformers.CONFIG_MAPPING[name]())
    if kind == "perception_lm":
        config.vision_config.architecture = PERCEPTION
    shrink(config)
    return config


def parts_of(config):
    """The configurations within one, by the name of the field."""
    return {name: value for name, value in vars(config).items() if isinstance(value, transformers.PreTrainedConfig)}


def shrink(config):
    """Make a configuration, and those within it, small; pyramids keep their sizes."""
    for part in parts_of(config).values():
        shrink(part)
    fields = vars(config)
    layers = fields.pop("_heterogeneity_spec", None)  # all layers alike
    for overrides in layers.per_layer_overrides.values() if layers else ():
        for name, value in overrides.items():
            fields.setdefault(name, value)
    pyramid = any(map(PYRAMID.fullmatch, fields))
    old = max((value for name, value in fields.items() if DEPTH.fullmatch(name) and isinstance(value, int)), default=0)
    new = DEPTHS["vision" if is_vision(config) else "text"]
    for name, value in list(fields.items()):
        made = value if pyramid else small(name, value, old, new, fields)
        if name.endswith("hidden_sizes") and value:
            made = list(value)  # which some classes add to a list
        if type(made) is not type(value) or made != value:
            setattr(config, name, made)
    if "stage_names" in fields and not pyramid:
        indices = fields["_out_indices"] = list(cut(fields["_out_indices"], old + 1, new + 1))
        fields["_out_features"] = [fields["stage_names"][index] for index in indices]
    if getattr(config, "architecture", None) == PERCEPTION:
        config.model_args = {"depth": DEPTHS["vision"], "embed_dim": WIDTH, "num_heads": HEADS, "img_size": 14 * GRID}
    for name, value in EXTRA.get(config.model_type, {}).items():
        setattr(config, name, value)


def is_vision(config):
    fields = ("patch_size", "image_size", "crop_size")
    return "text" not in config.model_type and (
        "vision" in config.model_type or any(map(vars(config).__contains__, fields))
    )


def small(name, value, old, new, fields):
    """What becomes of the `value` of a field of a configuration of `old` layers, which are to be `new`."""
    if isinstance(value, bool) or name.startswith("__"):
        return value
    if isinstance(value, int):
        if re.search("token_index$|_id$", name):
            return value % VOCABULARY
        if DEPTH.fullmatch(name):
            return min(value, new)
        if name in ("image_size", "pretrain_image_size", "crop_size", "input_size"):
            return GRID * patch_of(fields, value)
        if name == "window_size":
            patch = patch_of(fields, value)
            return 4 * patch if value >= 4 * patch else min(value, 4)
        if name in ("num_patches", "num_position_embeddings"):
            return GRID * GRID
        if name in ("pos_emb_height", "pos_emb_width", "posemb_grid_size", "image_embedding_size"):
            return GRID
        return next((min(size, value) for names, size in SIZES.items() if re.fullmatch(names, name)), value)
    if isinstance(value, list | tuple):
        kind = type(value)
        if name in ("image_size", "pretrain_image_size") and len(value) == 2:
            return kind([GRID * patch_of(fields, value[0])] * 2)
        if name == "stage_names":
            return kind(value[: new + 1])
        if old > new and len(value) == old:
            return kind([*value[: new - 1], value[-1]])
        if name.startswith(("window_block", "residual_block")):
            return kind(range(0, new, 2) if value else ())
        if name.startswith(("global_attn", "fullatt_block")):
            return kind(range(1, new, 2))
        if old > new and INDICES.fullmatch(name) and all(isinstance(one, int) for one in value):
            return kind(cut(value, old, new))
    return value


def cut(indices, old, new):
    """Indices below `old` -> as many below `new`, or all of those where they are fewer."""
    made = sorted({one * new // old if one >= 0 else max(one, -new) for one in indices})
    return made if len(made) == len(indices) else range(max(new - len(indices), 0), new)


def patch_of(fields, default):
    patch = fields.get("patch_size", fields.get("tubelet_size", default // GRID))
    return patch[-1] if isinstance(patch, list | tuple) else patch or default // GRID


PERCEPTION = "vit_pe_core_large_patch14_336"  # of timm
# The model types of parts that some model types lack by default.
PARTS = {
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
    "embedding_gemma2": {"vision_config": "gemma4_vision"},
    "gemma4": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
    "sapiens2": {"head_config": "sapiens2_head"},
}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
# Settings by model type, of what has no default or is not in proportion.
EXTRA = {
    "beit": {"out_indices": [1, 2, 3, 4], "use_relative_position_bias": True},
    "chameleon": {"vocabulary_map": {"<image>": 1, "IMGIMGA": 2}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "data2vec-vision": {"use_relative_position_bias": True},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "depth_pro": {"patch_size": 16 * GRID, "intermediate_hook_ids": [3, 1]},
    "detr": {"d_model": 2 * WIDTH, "encoder_attention_heads": 2 * HEADS},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 2 * WIDTH},
    "emu3": {"vocabulary_map": {"<image>": 1, "<|extra_200|>": 2, "<|visual token 000000|>": 3}},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROTARY},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "hiera": {"decoder_hidden_size": WIDTH, "decoder_depth": 2, "decoder_num_heads": HEADS},
    "hunyuan_vl_text": {"head_dim": WIDTH // HEADS},
    "llama4_vision_model": {
        "intermediate_size": 4 * WIDTH,
        "projector_input_dim": WIDTH,
        "projector_output_dim": WIDTH,
    },
    "minicpm_ocr_vision": {"insert_layer_id": 1},
    "minicpmv4_6_vision": {"insert_layer_id": 1},
    "minicpmv4_7_vision": {"insert_layer_id": 1},
    "perceiver": {"num_cross_attention_heads": 1, "num_self_attends_per_block": 4, "d_latents": 2 * WIDTH},
    "phi4_multimodal_audio": {"num_blocks": 2},
    "sapiens2": {"num_key_value_heads_per_layer": [HEADS, HEADS // 2, HEADS // 2, HEADS]},
    "sapiens2_head": {
        "upsample_out_channels": [WIDTH],
        "upsample_kernel_sizes": [4],
        "conv_out_channels": [WIDTH],
        "conv_kernel_sizes": [1],
        "scale_conv_out_channels": [WIDTH],
        "scale_conv_kernel_sizes": [1],
        "scale_final_input_size": WIDTH * (GRID // 2) ** 2,
        "scale_final_hidden_sizes": [WIDTH, WIDTH],
    },
    "t5gemma2_text": {"dropout_rate": 0.0},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": WIDTH // HEADS,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "eomt": {"num_blocks": 2},
    "eomt_dinov3": {"num_blocks": 2},
    "videomt": {"num_blocks": 2},
}


# Towers that are no plain ViT, of one size of tokens that attend to each other in blocks -> why.
NO_PLAIN_VIT = {
    "align_vision_model": "EfficientNet: convolutions",
    "apertus1p5_vision_tokenizer": "VQGAN: convolutions",
    "bit": "ResNet: convolutions",
    "chameleon_vqgan": "VQGAN: convolutions",
    "convnext": "ConvNeXt: convolutions",
    "convnextv2": "ConvNeXt: convolutions",
    "cvt": "CvT: convolutions make queries and keys, and patches merge",
    "deepseek_ocr2_encoder": "decoder over the features of another tower, causal in its queries",
    "dinat": "DiNAT: neighbourhoods attend, and patches merge",
    "dinov3_convnext": "ConvNeXt: convolutions",
    "donut-swin": "Swin: windows shift, and patches merge",
    "efficientloftr": "RepVGG: convolutions",
    "efficientnet": "EfficientNet: convolutions",
    "emu3_vqgan": "VQGAN: convolutions",
    "evolla": "no vision: reads proteins",
    "flava_image_codebook": "dVAE: convolutions",
    "florence_vision": "DaViT: channels attend, convolutions in blocks, and patches merge",
    "focalnet": "FocalNet: convolutions in place of attention",
    "fuyu": "no tower: patches go into the decoder by one linear layer",
    "gemma3n_vision": "MobileNet: convolutions",
    "gemma4_unified_vision": "no tower: patches go into the decoder by one linear layer",
    "glm_image_vqmodel": "VQ-VAE: convolutions",
    "glpn": "SegFormer: keys and patches are merged by convolutions",
    "groupvit_vision_model": "GroupViT: patches are gathered into groups",
    "hgnet_v2": "HGNet: convolutions",
    "hiera": "Hiera: patches are pooled between blocks",
    "imagegpt": "causal decoder over single pixels",
    "inkling_vision": "no attention: linear layers that fold patches",
    "janus_vqgan": "VQGAN: convolutions",
    "layoutlmv2": "ResNet: convolutions",
    "layoutlmv3": "no tower: one encoder for words and patches",
    "levit": "LeViT: convolutions in front, and patches merge",
    "lfm3_vl_vision": "convolutions in place of attention in most blocks",
    "maskformer-swin": "Swin: windows shift, and patches merge",
    "minicpm_ocr_vision": "2 x 2 patches merge between two blocks",
    "minicpmv4_6_vision": "2 x 2 patches merge between two blocks",
    "minicpmv4_7_vision": "2 x 2 patches merge between two blocks",
    "mistral4": "no vision: text alone",
    "mobilenet_v1": "MobileNet: convolutions",
    "mobilenet_v2": "MobileNet: convolutions",
    "mobilevit": "MobileViT: convolutions between its blocks",
    "mobilevitv2": "MobileViT: convolutions between its blocks",
    "neomme": "no tower: one encoder for words and patches",
    "perceiver": "Perceiver: latents attend to pixels",
    "poolformer": "PoolFormer: pooling in place of attention",
    "pp_lcnet": "PP-LCNet: convolutions",
    "pp_lcnet_v3": "PP-LCNet: convolutions",
    "pp_lcnet_v4": "PP-LCNet: convolutions",
    "pvt": "PVT: keys and patches are merged by convolutions",
    "pvt_v2": "PVT: keys and patches are merged by convolutions",
    "regnet": "RegNet: convolutions",
    "resnet": "ResNet: convolutions",
    "rt_detr_resnet": "ResNet: convolutions",
    "sam2_hiera_det_model": "Hiera: patches are pooled between blocks",
    "segformer": "SegFormer: keys and patches are merged by convolutions",
    "seggpt": "two pictures in one, which merge halfway",
    "superpoint": "VGG: convolutions",
    "swiftformer": "SwiftFormer: convolutions in blocks, and patches merge",
    "swin": "Swin: windows shift, and patches merge",
    "swin2sr": "Swin: windows shift",
    "swinv2": "Swin: windows shift, and patches merge",
    "textnet": "TextNet: convolutions",
    "timesformer": "each block attends over time, and then over space, of tokens in other groups",
    "timm fastvit_mci3": "FastViT: convolutions, and patches merge",
    "timm repvit_m1.dist_in1k": "RepViT: convolutions",
    "timm resnet50": "ResNet: convolutions",
    "timm swin_tiny_patch4_window7_224": "Swin: windows shift, and patches merge",
    "udop": "no tower: one encoder for words and patches",
    "uvdoc_backbone": "ResNet: convolutions",
    "videoprism_vision_model": "an encoder of frames, and one over times behind it",
    "vilt": "no tower: one encoder for words and patches",
    "visual_bert": "no vision: reads features of another model",
    "xclip_vision_model": "frames exchange messages in each block",
}


def build(name, kind):
    """A small model of a class, of finite weights that all have a part in what it gives."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(tiny_config(model_class, kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0, 0, 0).clamp_(-2, 2).add_(torch.randn_like(parameter), alpha=0.02)
    return model


def attempt(name, kind):
    """What becomes of one class, made small: what its row says beside its mappings, again whenever more is known."""
    try:
        model = build(name, kind)
    except Exception as error:
        yield {"built": False, "reason": first_line(error)}
        return
    row = {"built": True, "kinds": tower_kinds(model.config), "towers": []}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    yield row
    try:
        found = towers(model)
    except Exception as error:
        yield row | {"reason": first_line(error)}
        return
    for tower, (module, family) in found.items():
        result = {"name": tower, "class": type(module).__name__, "family": family.name}
        result["kind"] = getattr(getattr(module, "config", None), "model_type", None)
        start = time.perf_counter()
        try:
            neuroflow.enable_cache(model, tower=tower)
            result["milliseconds"] = 1e3 * (time.perf_counter() - start)
            neuroflow.disable_cache(model)
        except Exception as error:
            result["reason"] = row["reason"] = first_line(error)
        row["towers"].append(result)
        yield row


def tower_kinds(config):
    """The model types of the vision towers that a configuration is for."""
    if config.model_type.startswith("timm_"):
        return [f"timm {config.architecture if config.model_type == 'timm_wrapper' else config.backbone}"]
    parts = [part for name, part in parts_of(config).items() if not NO_TOWER.search(name)]
    return list(dict.fromkeys(kind for part in parts for kind in tower_kinds(part))) or [config.model_type]


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def send(sender, work, arguments):
    warnings.simplefilter("ignore")
    for row in work(*arguments):
        sender.send(row)


def each_apart(work, items):
    """(key, the last row that `work` yields for its arguments) of every (key, arguments), each in a process of its own.

    They are forked off this one. Of one that ends otherwise, or takes longer than SECONDS, the row says so.
    """
    context, items, running = multiprocessing.get_context("fork"), list(items), {}
    while items or running:
        while items and len(running) < AT_ONCE:
            key, arguments = items.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(sender, work, arguments))
            process.start()
            sender.close()
            running[receiver] = key, process, time.monotonic() + SECONDS, {"built": False}
        first = min(limit for _, _, limit, _ in running.values())
        ready = wait(running, max(first - time.monotonic(), 0))
        for receiver, (key, process, limit, row) in list(running.items()):
            late = time.monotonic() > limit
            if receiver in ready and not late:
                try:
                    running[receiver] = key, process, limit, receiver.recv()
                    continue
                except EOFError:
                    process.join()
                    if process.exitcode:
                        row |= {"reason": f"its process ended with {process.exitcode}"}
            elif late:
                process.kill()
                process.join()
                row |= {"reason": f"took more than {SECONDS} seconds"}
            else:
                continue
            receiver.close()
            del running[receiver]
            yield key, row


def verdict(row):
    """Of a row, one of VERDICTS."""
    if not row["built"]:
        return "not built"
    if any("milliseconds" in tower for tower in row["towers"]):
        return "accepted"
    return "no plain ViT" if all(kind in NO_PLAIN_VIT for kind in row["kinds"]) else "refused"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a class or a model type; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies" / "zoo.json")
    arguments = parser.parse_args()
    stem = arguments.out.resolve().with_suffix("")
    machine = begin(stem)
    transformers.logging.set_verbosity_error()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # some default configurations ask for a file
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = mappings()
    chosen = {
        name: (kinds, of)
        for name, (kinds, of) in found.items()
        if not arguments.names or {name, *kinds} & set(arguments.names)
    }
    rows = {}
    for name, row in each_apart(attempt, [(name, (name, kinds[0])) for name, (kinds, _) in chosen.items()]):
        kinds, of = chosen[name]
        rows[name] = {"class": name, "types": kinds, "mappings": of, **row, "verdict": verdict(row)}
        print(
            f"{len(rows)}/{len(chosen)}", rows[name]["verdict"], name, row.get("reason", "")[:120], sep="  ", flush=True
        )
    rows = [rows[name] for name in chosen]
    machine["timm"] = importlib.metadata.version("timm") if importlib.util.find_spec("timm") else "none"
    write(stem, machine, {"seconds": time.perf_counter() - start, "classes": len(rows)}, rows, text_of(rows))


def text_of(rows):
    """The Markdown of a table of rows."""
    about = __doc__.partition("\n\n")[2].strip()
    counts = {"all": Counter(row["verdict"] for row in rows)}
    for row in rows:
        for mapping in row["mappings"]:
            counts.setdefault(mapping, Counter())[row["verdict"]] += 1
    lines = [
        [mapping, str(count.total()), *(str(count[each]) for each in VERDICTS), plain_share(count)]
        for mapping, count in counts.items()
    ]
    parts = [f"# Models of transformers\n\n{about}", table(["mapping", "classes", *VERDICTS, "of plain ViTs"], lines)]
    found = of_towers(rows)
    count = Counter(each for _, each in found.values())
    lines = [[kind, str(classes), each] for kind, (classes, each) in found.items()]
    parts.append(
        f"## Towers\n\nOf {len(found)} towers, by model type, {count['accepted']} are accepted "
        f"and {count['refused']} refused, {plain_share(count)} of plain ViTs; {count['no plain ViT']} are none.\n\n"
        + table(["tower", "classes", "verdict"], lines)
    )
    for each in VERDICTS:
        lines = [
            [row["class"], ", ".join(row.get("kinds", row["types"])), "; ".join(reasons(row))]
            for row in rows
            if row["verdict"] == each
        ]
        parts.append(f"## {each.capitalize()}\n\n{table(['class', 'tower', ABOUT[each]], lines)}")
    return "\n\n".join(parts)


def of_towers(rows):
    """Of each model type of towers: how many classes hold it, and its verdict."""
    classes, verdicts = Counter(), {}
    for row in rows:
        taken = {tower["kind"] for tower in row.get("towers", ()) if "milliseconds" in tower}
        for kind in row.get("kinds", ()):
            classes[kind] += 1
            accepted = kind in taken or (taken and len(row["kinds"]) == 1)
            if accepted or verdicts.get(kind) != "accepted":
                verdicts[kind] = "accepted" if accepted else "no plain ViT" if kind in NO_PLAIN_VIT else "refused"
    return {kind: (classes[kind], verdicts[kind]) for kind in sorted(classes)}


def plain_share(count):
    plain = count["accepted"] + count["refused"]
    return share(count["accepted"] / plain) if plain else "-"


def reasons(row):
    """What is to be said of a row's towers."""
    if row["verdict"] == "no plain ViT":
        return [NO_PLAIN_VIT[kind] for kind in row["kinds"]]
    if row["verdict"] != "accepted":
        return [textwrap.shorten(row["reason"].replace("|", "/"), 160)]
    return [
        f"{tower['family']}, {tower['milliseconds']:.0f} ms"
        if "milliseconds" in tower
        else textwrap.shorten(tower["reason"], 80)
        for tower in row["towers"]
    ]


if __name__ == "__main__":
    main()
