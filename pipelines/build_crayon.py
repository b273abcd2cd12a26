"""Build crayon instruction data: `python pipelines/build_crayon.py --help`.

Reads:    images, from COCO panoptic files, LLaVA files, folders, lists of URIs, or sample scenes drawn on the spot
Writes:   OUT/crayon-*.parquet (one row per image, see schemas/crayon_row.py), OUT/manifest.json, OUT/report.html
Rejects:  what makes no row goes to OUT/rejects.jsonl with a reason, never to the rows
Not here: what a row says, see collavo/; the graph, see pipelines/graph.py
"""

if __name__ == "__main__":
    from pipelines.command import main

    raise SystemExit(main())
