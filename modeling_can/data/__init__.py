"""
Images on their way to the model: sources (`sources`, with `folders`, `listing`, `tars`, `faults`, `reading`), one
image (`formats`, `decoding`, `arrays`, `crops`), the stream of views and its workers (`stream`, `loading`,
`bad_samples`), images that stay on the device (`resident`), and what happens there (`augmentations`).
"""

from .bad_samples import append_line, bad_sample_line, bad_sample_lines, refuse_bad
from .folders import SAMPLE_DATA, resolve_name
from .loading import resume, view_loader
from .reading import encoded, located, read_bytes
from .sources import ImageSource
from .stream import ViewStream, mean_and_std


__all__ = [
    "SAMPLE_DATA",
    "ImageSource",
    "ViewStream",
    "append_line",
    "bad_sample_line",
    "bad_sample_lines",
    "encoded",
    "located",
    "mean_and_std",
    "read_bytes",
    "refuse_bad",
    "resolve_name",
    "resume",
    "view_loader",
]
