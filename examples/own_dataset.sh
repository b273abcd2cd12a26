#!/usr/bin/env bash
# Your own pictures: build, train, evaluate, ask. Annotations and dialogues are optional.
#
#   IMAGES=photos bash examples/own_dataset.sh
#   IMAGES=photos ANNOTATIONS=panoptic.json MASKS=panoptic DIALOGUES=dialogues.json IMAGE_ROOT=. bash examples/own_dataset.sh
#
# Try it on 40 drawn scenes, which takes some minutes on two cores:
#
#   python -m collavo.scenes --output scenes --count 40 --size 320x240
#   IMAGES=scenes/images ANNOTATIONS=scenes/panoptic.json DIALOGUES=scenes/dialogues.json IMAGE_ROOT=scenes \
#       VALIDATION_RATIO=0.2 TRAIN_FLAGS="--max_steps 10" bash examples/own_dataset.sh
#
# Run so, with the preset `tiny` on a CPU. Never run on photographs, nor with a GPU.
set -euo pipefail

IMAGES=${IMAGES:?name a folder of pictures}
ANNOTATIONS=${ANNOTATIONS:-}          # COCO panoptic JSON, categories numbered as COCO's 133; without it a network segments
MASKS=${MASKS:-}                      # its mask PNGs; by default the folder beside it that has its name
DIALOGUES=${DIALOGUES:-}              # JSON in LLaVA's format
IMAGE_ROOT=${IMAGE_ROOT:-$IMAGES}     # folder that image paths in DIALOGUES start from
CHECKPOINT=${CHECKPOINT:-facebook/mask2former-swin-large-coco-panoptic}  # hub id or folder; `scenes` for drawn scenes
DATA=${DATA:-own/data}
RUN=${RUN:-own/run}
PRESET=${PRESET:-}                    # empty for collavo-7b on a GPU, else tiny, which knows drawn scenes only
VALIDATION_RATIO=${VALIDATION_RATIO:-0.05}  # share of pictures that evaluation asks about
TRAIN_FLAGS=${TRAIN_FLAGS:-}          # more flags of collavo.train

# 1. Build. With annotations alone no network runs, and a core does hundreds of images a second. Without, a GPU is wise.
sources=()
if [ -n "$ANNOTATIONS" ]; then
    sources+=(--coco_panoptic "$ANNOTATIONS" --coco_images "$IMAGES")
    if [ -n "$MASKS" ]; then sources+=(--coco_masks "$MASKS"); fi
    if [ -n "$DIALOGUES" ]; then sources+=(--llava_json "$DIALOGUES" --image_root "$IMAGE_ROOT" --segmenter annotations); fi
else
    sources+=(--images "$IMAGES" --segmenter mask2former --segmenter_checkpoint "$CHECKPOINT")
    if [ -n "$DIALOGUES" ]; then sources+=(--llava_json "$DIALOGUES" --image_root "$IMAGE_ROOT"); fi
fi
python pipelines/build_crayon.py "${sources[@]}" --validation_ratio "$VALIDATION_RATIO" --output "$DATA" --overwrite
echo "Look at $DATA/report.html before you train: are segments, counts and boxes right?"

# 2. Train. Instruction tuning needs dialogues; without them the Crayon Prompt alone is trained.
phase=all
if [ -z "$DIALOGUES" ]; then phase=cpt; fi
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
python -m collavo.train --data "$DATA"/*.parquet --output_dir "$RUN" ${PRESET:+--preset "$PRESET"} --phase "$phase" \
    --overwrite $TRAIN_FLAGS

# 3. Evaluate on the validation rows. What they hold as truth is what the annotations, or the network, found.
python -m collavo.evaluate --model "$RUN" --data "$DATA"/*.parquet

# 4. Ask about the first picture of the data, with the map that its row holds.
image_id=$(python -c 'import sys; from collavo.dataset import find_files, read_rows
print(next(read_rows(find_files(sys.argv[1:]))).image_id)' "$DATA")
python -m collavo.chat --model "$RUN" --data "$DATA"/*.parquet --image_id "$image_id" --prompt "What is in this picture?"

# 5. For other trainers.
python -m collavo.export_data --data "$DATA"/*.parquet --to llava --split train --output "$RUN/llava" --overwrite
