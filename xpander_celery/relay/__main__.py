"""`python -m xpander_celery.relay`: what a worker executes."""

import os
import sys

from xpander_celery.relay.process import main

sys.exit(main(sys.argv[1:], os.environ))
