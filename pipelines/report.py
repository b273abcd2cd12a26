def write_report(output: str, manifest: dict) -> None:
    pass
