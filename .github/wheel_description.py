"""The package's description for hatchling: README.md, with topics of `jaxft help` in place of its links to
other files of the repository, which would be dead elsewhere.
"""

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Description(MetadataHookInterface):
    """Set the project's readme."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description to the metadata."""
        sys.path.insert(0, self.root)
        try:
            from jaxft.cli.commands import with_topics
        finally:
            sys.path.remove(self.root)
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_topics(text)}
