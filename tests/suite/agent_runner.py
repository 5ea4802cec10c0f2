"""Run `agent.main` for each line of standard input, without the start of a process for each.

A line is an environment; the response to it is a line with what `main` printed, what it returned,
and the CPU seconds that it took.
"""

import asyncio
import functools
import json
import os
import ssl
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

with redirect_stderr(None):  # the SDK warns
    import authplane  # noqa: F401 # type: ignore[import-not-found]

from agent import main

# it reads all the certificates of the machine, and each call has four HTTP clients
ssl.create_default_context = functools.cache(ssl.create_default_context)

for line in sys.stdin:
    os.environ.clear()
    os.environ.update(json.loads(line))
    started = time.process_time()
    with redirect_stdout(StringIO()) as printed, redirect_stderr(None):
        failure = asyncio.run(main())
    print(json.dumps([printed.getvalue(), failure, time.process_time() - started]), flush=True)
