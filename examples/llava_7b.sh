#!/usr/bin/env bash
# The paper's recipe on LLaVA-1.5-7B: COCO's annotations and LLaVA's dialogues, both phases, evaluation, export.
#
# Never run on LLaVA's files: no GPU, no hub download, so time and memory are unknown. All steps but the second ran on
# drawn scenes in the same layout, with the tiny base on a CPU.
#
#   LLaVA's files and images as its README lays them out: playground/data/coco/train2017, gqa, ocr_vqa, textvqa, vg
#
#   PLAYGROUND=/data/playground/data COCO_ANNOTATIONS=/data/annotations GPUS=8 bash examples/llava_7b.sh
#
# The same command again goes on where it stopped: what is built, imported or trained already is kept.
set -euo pipefail

PLAYGROUND=${PLAYGROUND:?name the folder that LLaVA image paths start from}
COCO_ANNOTATIONS=${COCO_ANNOTATIONS:?name the folder with panoptic_train2017.json and panoptic_train2017/}
LLAVA_JSON=${LLAVA_JSON:-$PLAYGROUND/llava_v1_5_mix665k.json}
BASE=${BASE:-llava-hf/llava-1.5-7b-hf}
PRESET=${PRESET:-}  # empty for a base that step 2 makes of BASE
OUT=${OUT:-llava}
DEVICE=${DEVICE:-cuda}  # that segments
GPUS=${GPUS:-1}
BUILD_FLAGS=${BUILD_FLAGS:-}  # such as --resume for what a stopped build has segmented, or --max_images 1000 for a trial
TRAIN_FLAGS=${TRAIN_FLAGS:---micro_batch_size 4 --gradient_checkpointing}

# 1. Build. COCO's images have exact masks; Mask2Former (Swin-L) segments the others. Dialogues without an image, some
#    40,000 in the 665k mix, become rows without one. A process for each GPU of the machine segments.
if [ ! -e "$OUT/data/manifest.json" ]; then
    # shellcheck disable=SC2086  # BUILD_FLAGS is several words
    python pipelines/build_crayon.py \
        --coco_panoptic "$COCO_ANNOTATIONS/panoptic_train2017.json" --coco_images "$PLAYGROUND/coco/train2017" \
        --llava_json "$LLAVA_JSON" --image_root "$PLAYGROUND" --device "$DEVICE" --output "$OUT/data" $BUILD_FLAGS
fi

# 2. A base: LLaVA with a new Crayon Prompt, which has no effect yet, 490 px, its projector kept.
if [ -z "$PRESET" ]; then
    PRESET=$OUT/base
    [ -d "$PRESET" ] || python -m collavo.import_base --llava "$BASE" --chat_format vicuna --output "$PRESET"
fi

# 3. Train both phases: one pass each, 32 sequences a step over all GPUs.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300  # a stop waits for a step and its checkpoint; from torch 2.12, before it 30 s
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
torchrun --nproc_per_node "$GPUS" -m collavo.train --data "$OUT"/data/*.parquet \
    --preset "$PRESET" --output_dir "$OUT/run" --resume $TRAIN_FLAGS

# 4. Evaluate with and without the object list in the prompt, then public benchmarks by lmms-eval.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet --object_list both --max_images 500
if command -v lmms-eval; then  # pip install '.[lmms-eval]'
    lmms-eval --model collavo --model_args pretrained="$OUT/run" --tasks pope
fi

# 5. One model without adapters, for plain transformers.
[ -d "$OUT/merged" ] || python -m collavo.export_model --model "$OUT/run" --output "$OUT/merged" --as merged
