"""A verb with little memory left: python tests/support/limited_worker.py MEGABYTES VERB ARGUMENTS...

The limit (RLIMIT_AS, as `ulimit -v` sets it) is what the process has mapped once its libraries are loaded,
and MEGABYTES more."""

import resource
import sys
from pathlib import Path

import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - what an import maps is not what is limited

from inheritune import cli as program

mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
program.leave(program.main(sys.argv[2:]))
