#!/usr/bin/env bash
# ADE20K with its own 150 classes, or any other data set in COCO's panoptic format that is split in two: build, train,
# evaluate, ask. No flag says anything about classes; those of the JSON are the model's.
#
#   ADE20K   ADEChallengeData2016 and annotations_instance.tar from http://sceneparsing.csail.mit.edu/; Mask2Former's
#            datasets/prepare_ade20k_pan_seg.py makes ade20k_panoptic_{train,val}.json and the masks beside them
#
#       ADE=/data/ADEChallengeData2016 bash examples/ade20k.sh
#
#   Cityscapes, after createPanopticImgs.py of cityscapesScripts
#
#       TRAIN=gtFine/cityscapes_panoptic_train.json TRAIN_IMAGES=leftImg8bit/train \
#       VAL=gtFine/cityscapes_panoptic_val.json VAL_IMAGES=leftImg8bit/val bash examples/ade20k.sh
#
# The same command again goes on where it stopped: what is built or trained already is kept.
#
# Its commands were run with drawn pictures in both layouts, with the preset `tiny` on a CPU; never with the data sets themselves.
set -euo pipefail

ADE=${ADE:-}
TRAIN=${TRAIN:-${ADE:?name the folder ADEChallengeData2016}/ade20k_panoptic_train.json}  # masks in the folder of its name
TRAIN_IMAGES=${TRAIN_IMAGES:-$ADE/images/training}
VAL=${VAL:-$ADE/ade20k_panoptic_val.json}
VAL_IMAGES=${VAL_IMAGES:-$ADE/images/validation}
OUT=${OUT:-ade20k}
TRAIN_FLAGS=${TRAIN_FLAGS:-}  # more flags of collavo.train, such as --preset

# 1. Build. The two files stay two splits.
if [ ! -e "$OUT/data/manifest.json" ]; then
    python pipelines/build_crayon.py --coco_panoptic "$TRAIN" "$VAL" --coco_images "$TRAIN_IMAGES" "$VAL_IMAGES" \
        --coco_split train validation --output "$OUT/data"
fi
echo "Look at $OUT/data/report.html before you train: are segments, counts and boxes right?"

# 2. Train. There are no dialogues, so the image adapter alone is trained. Without a GPU this takes the preset tiny.
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
python -m collavo.train --data "$OUT"/data/*.parquet --output_dir "$OUT/run" --resume $TRAIN_FLAGS

# 3. Evaluate on the validation split, 500 pictures of it at most.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet --max_images 500

# 4. Ask about the first picture of the validation split, with the map that its row holds.
image_id=$(python -c 'import sys, pyarrow.parquet as pq
print(next(pq.ParquetFile(sys.argv[1]).iter_batches(1, columns=["image_id"]))["image_id"][0])' "$OUT"/data/validation-00000-*)
python -m collavo.chat --model "$OUT/run" --data "$OUT"/data/*.parquet --image_id "$image_id" \
    --prompt "What is in this picture?"
