#!/usr/bin/env bash
# COCO 2017 from its panoptic annotations: build without a model, train the Crayon Prompt, evaluate.
#
# Never run as a whole: COCO was not downloaded here, and no GPU was there. The commands and their flags are tested.
#
#   train2017.zip, val2017.zip          http://images.cocodataset.org/zips/
#   panoptic_annotations_trainval2017   http://images.cocodataset.org/annotations/
#
#   COCO=/data/coco bash examples/coco.sh
set -euo pipefail

COCO=${COCO:?name the folder with train2017/ and annotations/}
ANNOTATIONS=${ANNOTATIONS:-$COCO/annotations/panoptic_train2017.json}  # its masks lie beside it, in panoptic_train2017/
DATA=${DATA:-coco/data}
RUN=${RUN:-coco/run}
PRESET=${PRESET:-collavo-7b}  # or the folder of a base that collavo.import_base made
GPUS=${GPUS:-1}

# 1. Build: 118,287 images. At the 337 images a second and core that were measured (docs/cost.md), six minutes on one
#    core if the disk keeps up. The rows hold the images, so the data set takes as much room as train2017.
python pipelines/build_crayon.py --coco_panoptic "$ANNOTATIONS" --coco_images "$COCO/train2017" --segmenter annotations \
    --direct_running_mode multi_processing --direct_num_workers 0 --max_reject_ratio 0.01 --output "$DATA"

# 2. Train the Crayon Prompt. COCO has no dialogues, so there is no instruction tuning; llava_7b.sh has both. Needs a GPU;
#    neither time nor memory was measured, hence the small micro batch.
torchrun --nproc_per_node "$GPUS" -m collavo.train --data "$DATA"/*.parquet --output_dir "$RUN" --preset "$PRESET" \
    --phase cpt --micro_batch_size 4 --gradient_checkpointing

# 3. Evaluate: 500 images of the validation rows, whose truth are COCO's annotations.
python -m collavo.evaluate --model "$RUN" --data "$DATA"/*.parquet --max_images 500
