#!/usr/bin/env bash
# Pictures and rows in an S3 store: a MinIO server on this machine stands for one. Needs Go, which compiles it.
#
#   bash examples/s3.sh
#
# With a store of your own, name it by the same variables, for Amazon's without an endpoint; leave out step 1, and name your
# bucket in place of `crayon`.
set -euo pipefail

OUT=${OUT:-s3}
PORT=${PORT:-9000}
export AWS_ENDPOINT_URL=http://localhost:$PORT AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=collavo AWS_SECRET_ACCESS_KEY=collavo-secret
PATH=${GOBIN:-$(go env GOPATH)/bin}:$PATH

# 1. Get the server, and start it; it ends with this script, and its bucket with the next run.
command -v minio >/dev/null || go install github.com/minio/minio@latest
rm -rf "$OUT/store" && mkdir -p "$OUT/store/crayon"  # a folder there is a bucket
MINIO_ROOT_USER=$AWS_ACCESS_KEY_ID MINIO_ROOT_PASSWORD=$AWS_SECRET_ACCESS_KEY \
    minio server "$OUT/store" --address ":$PORT" >"$OUT/minio.log" &
trap 'kill $(jobs -p); wait' EXIT
until (: </dev/tcp/localhost/"$PORT") 2>/dev/null; do sleep 0.2; done

# 2. Draw scenes and put them into the store.
python -m collavo.scenes --output "$OUT/scenes" --count 40 --size 160x120 --overwrite
python -c 'import sys, pyarrow.fs; pyarrow.fs.copy_files(*sys.argv[1:])' "$OUT/scenes" s3://crayon/scenes

# 3. Build, and train a step on the rows; nothing of either lies on the local disk but what is trained.
python pipelines/build_crayon.py --coco_panoptic s3://crayon/scenes/panoptic.json \
    --coco_images s3://crayon/scenes/images --llava_json s3://crayon/scenes/dialogues.json \
    --image_root s3://crayon/scenes --segmenter annotations --output s3://crayon/data
python -m collavo.train --data 's3://crayon/data/*.parquet' --preset tiny --max_steps 1 --batch_size 2 --device cpu \
    --output_dir "$OUT/run" --overwrite

# 4. Look at some rows.
python -c 'import itertools, sys, collavo
for row in itertools.islice(collavo.read_rows(collavo.find_files(sys.argv[1:])), 5):
    print(row.image_id, row.split, *row.size_wh, len(row.segments), "segments,", len(row.instructions), "instructions")' s3://crayon/data
