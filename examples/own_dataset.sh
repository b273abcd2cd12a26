#!/usr/bin/env bash
# Your own pictures with your own classes: build, train, evaluate, ask, export. Dialogues are optional.
#
# You need a COCO panoptic JSON for training and one for validation, with a mask PNG per picture in the folder beside
# each that has its name. The classes are those of the JSON's `categories`:
#
#   [{"id": 0, "name": "sky", "isthing": 0}, {"id": 8, "name": "car", "isthing": 1}, ...]
#
#   TRAIN=road/panoptic_train.json TRAIN_IMAGES=road/train VAL=road/panoptic_val.json VAL_IMAGES=road/val \
#       bash examples/own_dataset.sh
#
# The same command again goes on where it stopped: what is built or trained already is kept.
#
# Run as a whole on drawn data, and its steps one by one on 468 road photographs of CamVid with eleven classes, on a CPU;
# docs/own-data.md tells what came out. Never run with a GPU.
set -euo pipefail

TRAIN=${TRAIN:?name a COCO panoptic JSON}
TRAIN_IMAGES=${TRAIN_IMAGES:?name the folder of its pictures}
VAL=${VAL:?name a COCO panoptic JSON of the same classes}
VAL_IMAGES=${VAL_IMAGES:?name the folder of its pictures}
DIALOGUES=${DIALOGUES:-}              # a file of dialogues about the training pictures, in LLaVA's format or as messages
OUT=${OUT:-own}
TRAIN_FLAGS=${TRAIN_FLAGS:-}          # more flags of collavo.train, such as --preset

# 1. Build. No network runs, and a core does hundreds of pictures a second.
sources=(--coco_panoptic "$TRAIN" "$VAL" --coco_images "$TRAIN_IMAGES" "$VAL_IMAGES" --coco_split train validation)
if [ -n "$DIALOGUES" ]; then
    sources+=(--llava_json "$DIALOGUES" --image_root "$TRAIN_IMAGES" --llava_split train --segmenter annotations)
fi
if [ ! -e "$OUT/data/manifest.json" ]; then
    python pipelines/build_crayon.py "${sources[@]}" --output "$OUT/data"
fi
echo "Look at $OUT/data/report.html before you train: are segments, counts and boxes right?"

# 2. Train. Crayon data alone train the image adapter alone. Without a GPU this takes the preset tiny.
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
python -m collavo.train --data "$OUT"/data/*.parquet --output_dir "$OUT/run" --resume $TRAIN_FLAGS

# 3. Evaluate on the validation split: questions whose answers follow from your annotations.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet

# 4. Ask about the first picture of the validation split, with the map that its row holds.
image_id=$(python -c 'import sys, pyarrow.parquet as pq
print(next(pq.ParquetFile(sys.argv[1]).iter_batches(1, columns=["image_id"]))["image_id"][0])' "$OUT"/data/validation-00000-*)
python -m collavo.chat --model "$OUT/run" --data "$OUT"/data/*.parquet --image_id "$image_id" \
    --prompt "What is in this picture?"

# 5. For other trainers.
python -m collavo.export_data --data "$OUT"/data/*.parquet --to llava --split train --output "$OUT/llava" --overwrite
