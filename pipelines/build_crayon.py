"""Build crayon instruction data: `python pipelines/build_crayon.py --help`.

Reads:    images, from COCO panoptic files, LLaVA files, folders, lists of URIs, or sample scenes drawn on the spot
Writes:   OUT/crayon-*.parquet (one row per image, see schemas/crayon_row.py), OUT/manifest.json, OUT/report.html
Rejects:  what makes no row goes to OUT/rejects.jsonl with a reason, never to the rows
Not here: what a row says, see collavo/; the graph, see pipelines/graph.py
"""

import logging

if __name__ == "__main__":
    # Beam says on import that Google's client libraries are missing, which only a job on Google Cloud needs, and of an
    # incomplete command line for such a job that it made no bucket, before the line that says what is missing.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    logging.getLogger("apache_beam.options.pipeline_options").setLevel(logging.ERROR)
    from pipelines.command import main

    raise SystemExit(main())
