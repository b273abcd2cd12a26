#!/usr/bin/env bash
# The paper's recipe on LLaVA-1.5-7B: COCO's annotations and LLaVA's dialogues, both phases, evaluation, export.
#
# Never run: no GPU, no hub download. The commands and their flags are tested; time and memory are unknown.
#
#   LLaVA's files and images as its README lays them out: playground/data/coco/train2017, gqa, ocr_vqa, textvqa, vg
#
#   PLAYGROUND=/data/playground/data COCO_ANNOTATIONS=/data/annotations GPUS=8 bash examples/llava_7b.sh
set -euo pipefail

PLAYGROUND=${PLAYGROUND:?name the folder that LLaVA image paths start from}
COCO_ANNOTATIONS=${COCO_ANNOTATIONS:?name the folder with panoptic_train2017.json and panoptic_train2017/}
LLAVA_JSON=${LLAVA_JSON:-$PLAYGROUND/llava_v1_5_mix665k.json}
BASE=${BASE:-llava-hf/llava-1.5-7b-hf}
OUT=${OUT:-llava}
GPUS=${GPUS:-1}

# 1. Build. COCO's images have exact masks; Mask2Former (Swin-L) segments the others on one GPU. Entries without an image
#    are rejects, some 40,000 in the 665k mix, so no --max_reject_ratio here: read the counts in manifest.json.
python pipelines/build_crayon.py \
    --coco_panoptic "$COCO_ANNOTATIONS/panoptic_train2017.json" --coco_images "$PLAYGROUND/coco/train2017" \
    --llava_json "$LLAVA_JSON" --image_root "$PLAYGROUND" --device cuda --output "$OUT/data"

# 2. A base: LLaVA with a closed Crayon Prompt, 490 px, its projector kept.
python -m collavo.import_base --llava "$BASE" --chat_format vicuna --output "$OUT/base"

# 3. Train both phases: one pass each, 32 sequences a step over all GPUs. Go on after a stop with --resume.
torchrun --nproc_per_node "$GPUS" -m collavo.train --data "$OUT"/data/*.parquet --preset "$OUT/base" \
    --output_dir "$OUT/run" --micro_batch_size 4 --gradient_checkpointing

# 4. Evaluate with and without the object list in the prompt, then public benchmarks by lmms-eval.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet --object_list both --max_images 500
lmms-eval --model collavo --model_args pretrained="$OUT/run" --tasks pope  # pip install 'collavo[lmms-eval]'

# 5. One model without adapters, for plain transformers.
python -m collavo.export_model --model "$OUT/run" --output "$OUT/merged" --as merged
