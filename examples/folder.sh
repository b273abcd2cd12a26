#!/usr/bin/env bash
# A folder of pictures and nothing else: a network segments them; then train, evaluate, ask.
#
#   IMAGES=photos bash examples/folder.sh
#
# Try it on 40 drawn scenes, which takes some minutes on two cores:
#
#   python -m collavo.scenes --output scenes --count 40 --size 320x240
#   IMAGES=scenes/images CHECKPOINT=scenes VALIDATION_RATIO=0.2 TRAIN_FLAGS="--max_steps 10" bash examples/folder.sh
#
# The same command again goes on where it stopped: what is built or trained already is kept. A build that was stopped while
# its network ran goes on with BUILD_FLAGS=--resume.
#
# Run as a whole on drawn scenes; never with published weights, nor with a GPU.
set -euo pipefail

IMAGES=${IMAGES:?name a folder of pictures}
# A network of transformers for universal segmentation, hub id or folder: docs/segmenters.md says which. Its classes
# become those of the data set and of the model; the checkpoints of ADE20K, Cityscapes and Mapillary Vistas have other
# ones than COCO's. `scenes` is the small one of this package.
CHECKPOINT=${CHECKPOINT:-facebook/mask2former-swin-large-coco-panoptic}
DIALOGUES=${DIALOGUES:-}              # a file of dialogues about these pictures, in LLaVA's format or as messages
VALIDATION_RATIO=${VALIDATION_RATIO:-0.05}  # share of pictures that evaluation asks about
OUT=${OUT:-folder}
BUILD_FLAGS=${BUILD_FLAGS:-}          # such as --resume for what a stopped build has segmented
TRAIN_FLAGS=${TRAIN_FLAGS:-}          # more flags of collavo.train, such as --preset

# 1. Build. A GPU is wise with a large checkpoint.
sources=(--images "$IMAGES" --segmenter transformers --segmenter_checkpoint "$CHECKPOINT")
if [ -n "$DIALOGUES" ]; then sources+=(--llava_json "$DIALOGUES" --image_root "$IMAGES"); fi
if [ ! -e "$OUT/data/manifest.json" ]; then
    # shellcheck disable=SC2086  # BUILD_FLAGS is several words
    python pipelines/build_crayon.py "${sources[@]}" --validation_ratio "$VALIDATION_RATIO" --output "$OUT/data" $BUILD_FLAGS
fi
echo "Look at $OUT/data/report.html before you train: are segments, counts and boxes right?"

# 2. Train. Without dialogues the image adapter alone is trained. Without a GPU this takes the preset tiny.
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
python -m collavo.train --data "$OUT"/data/*.parquet --output_dir "$OUT/run" --resume $TRAIN_FLAGS

# 3. Evaluate. What the network found counts as the truth.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet --max_images 500

# 4. Ask about a picture as it comes, segmented on the spot.
picture=$(find "$IMAGES" -type f ! -name '.*' \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' -o -iname '*.webp' -o -iname '*.bmp' -o -iname '*.tif' -o -iname '*.tiff' \) -print -quit)
python -m collavo.chat --model "$OUT/run" --segmenter transformers --segmenter_checkpoint "$CHECKPOINT" \
    --image "$picture" --prompt "What is in this picture?"
