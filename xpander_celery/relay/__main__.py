"""`python -m xpander_celery.relay`: what a worker executes."""

import gc
import os
import sys

gc.disable()  # while modules load, which makes much and frees nothing; on again when the relay is at work (`process`)

from xpander_celery.relay.process import main  # noqa: E402

sys.exit(main(sys.argv[1:], os.environ))
