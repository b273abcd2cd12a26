#!/usr/bin/env bash
# A segmenter for classes of your own: annotate some pictures, teach a network with them, let it annotate all others.
#
# You need what examples/own_dataset.sh needs, and a folder of pictures without annotation:
#
#   TRAIN=road/panoptic_train.json TRAIN_IMAGES=road/train VAL=road/panoptic_val.json VAL_IMAGES=road/val \
#       IMAGES=road/more bash examples/own_segmenter.sh
#
# The same command again goes on where it stopped: what is built or trained already is kept. A build that was stopped while
# its network ran goes on with BUILD_FLAGS=--resume.
#
# Its steps were run on 468 road photographs of CamVid, on a CPU; docs/segmenters.md tells what came out. Never run with a
# GPU or with published weights.
set -euo pipefail

TRAIN=${TRAIN:?name a COCO panoptic JSON}
TRAIN_IMAGES=${TRAIN_IMAGES:?name the folder of its pictures}
VAL=${VAL:?name a COCO panoptic JSON of the same classes}
VAL_IMAGES=${VAL_IMAGES:?name the folder of its pictures}
IMAGES=${IMAGES:?name a folder of pictures without annotation}
# What to start from: `scenes`, the small network of this package, or a hub id or folder as docs/segmenters.md lists them.
CHECKPOINT=${CHECKPOINT:-scenes}
OUT=${OUT:-own_segmenter}
SEGMENTER_FLAGS=${SEGMENTER_FLAGS:-}  # more flags of collavo train-segmenter, such as --steps
BUILD_FLAGS=${BUILD_FLAGS:-}          # of the build of IMAGES, such as --resume for what a stopped one has segmented
TRAIN_FLAGS=${TRAIN_FLAGS:-}          # more flags of collavo.train, such as --max_steps

# 1. Rows of the annotated pictures; no network runs.
if [ ! -e "$OUT/annotated/manifest.json" ]; then
    python pipelines/build_crayon.py --coco_panoptic "$TRAIN" "$VAL" --coco_images "$TRAIN_IMAGES" "$VAL_IMAGES" \
        --coco_split train validation --output "$OUT/annotated"
fi

# 2. A segmenter for their classes, judged class by class on the validation rows.
if [ ! -e "$OUT/segmenter/config.json" ]; then
    # shellcheck disable=SC2086  # SEGMENTER_FLAGS is several words
    python -m collavo.train_segmenter --data "$OUT"/annotated/*.parquet --segmenter_checkpoint "$CHECKPOINT" \
        --output_dir "$OUT/segmenter" $SEGMENTER_FLAGS
fi

# 3. Rows of the other pictures, which it segments.
if [ ! -e "$OUT/data/manifest.json" ]; then
    # shellcheck disable=SC2086  # BUILD_FLAGS is several words
    python pipelines/build_crayon.py --images "$IMAGES" --segmenter transformers --segmenter_checkpoint "$OUT/segmenter" \
        --validation_ratio 0.1 --output "$OUT/data" $BUILD_FLAGS
fi
echo "Look at $OUT/data/report.html before you train: are segments, counts and boxes right?"

# 4. Train; judge by the annotated pictures of the validation split; ask about a picture as it comes.
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
python -m collavo.train --data "$OUT"/data/*.parquet --output_dir "$OUT/run" --resume $TRAIN_FLAGS
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/annotated/*.parquet
picture=$(find "$IMAGES" -type f ! -name '.*' \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' -o -iname '*.webp' -o -iname '*.bmp' -o -iname '*.tif' -o -iname '*.tiff' \) -print -quit)
python -m collavo.chat --model "$OUT/run" --segmenter transformers --segmenter_checkpoint "$OUT/segmenter" \
    --image "$picture" --prompt "How many cars are there?"
