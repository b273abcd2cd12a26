#!/usr/bin/env bash
# COCO 2017 from its panoptic annotations: build without a model, train, evaluate.
#
#   train2017.zip, val2017.zip          http://images.cocodataset.org/zips/
#   panoptic_annotations_trainval2017   http://images.cocodataset.org/annotations/; unpack the zips of masks in it too
#
#   COCO=/data/coco bash examples/coco.sh
#
# The same command again goes on where it stopped: what is built or trained already is kept.
#
# Never run on COCO as a whole, which was not downloaded here, nor on a GPU. All steps ran on drawn scenes in its layout
# with the tiny base, and the build on one of its photographs.
set -euo pipefail

COCO=${COCO:?name the folder with train2017/, val2017/ and annotations/}
OUT=${OUT:-coco}
GPUS=${GPUS:-1}
TRAIN_FLAGS=${TRAIN_FLAGS:---preset collavo-7b --micro_batch_size 4 --gradient_checkpointing}

# 1. Build: 118,287 images for training, 5,000 for validation. At the 337 images a second and core that were measured
#    (docs/cost.md), six minutes on one core if the disk keeps up. The rows hold the images, so the data set takes as
#    much room as they do.
if [ ! -e "$OUT/data/manifest.json" ]; then
    python pipelines/build_crayon.py \
        --coco_panoptic "$COCO/annotations/panoptic_train2017.json" "$COCO/annotations/panoptic_val2017.json" \
        --coco_images "$COCO/train2017" "$COCO/val2017" --coco_split train validation --segmenter annotations \
        --max_reject_ratio 0.01 --output "$OUT/data"
fi

# 2. Train. COCO has no dialogues, so the image adapter alone is trained; llava_7b.sh trains both. Needs a GPU; time was never
#    measured, and memory only estimated (docs/training.md), hence the checkpointing.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300  # a stop waits for a step and its checkpoint; from torch 2.12, before it 30 s
# shellcheck disable=SC2086  # TRAIN_FLAGS is several words
torchrun --nproc_per_node "$GPUS" -m collavo.train --data "$OUT"/data/*.parquet \
    --output_dir "$OUT/run" --resume $TRAIN_FLAGS

# 3. Evaluate: 500 images of the validation split, whose truth are COCO's annotations.
python -m collavo.evaluate --model "$OUT/run" --data "$OUT"/data/*.parquet --max_images 500
