"""A hook of MkDocs: pages that include files from elsewhere in the repository find those files' pictures."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# benchmarks/RESULTS.md, which results.md includes, names its pictures relative to benchmarks/.
PICTURES = Path(__file__).parents[1] / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the published results to the site, under the names that the text has for them."""
    for path in sorted(PICTURES.glob("results/*.png")):
        files.append(File.generated(config, path.relative_to(PICTURES).as_posix(), abs_src_path=str(path)))
    return files
