"""`make fuzz`: many random programs (programs.py), each checked in the ways of test_programs.py, in fp32 and one
half precision.

They come in batches, each from a seed of its own. A batch that fails is run again by its seed alone:

    make fuzz ARGS="--seed 1234 --programs 1"
"""

import argparse
import random
import time

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from models import HALVES
from test_programs import STEPS, check_dtypes, check_in_half_precision, check_in_single_precision

BATCH = 250


def check(steps, dtype):
    check_in_single_precision(steps)
    check_in_half_precision(steps, dtype)
    check_dtypes(steps, dtype)


def run_batch(number):
    """Run BATCH programs; raises what hypothesis raises for the smallest that fails."""
    quietly = settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    count = 0

    @quietly
    @seed(number)
    @given(STEPS, st.sampled_from(HALVES))
    def batch(steps, dtype):
        nonlocal count
        check(steps, dtype)
        count += 1

    batch()
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20_000, help="how many, at least (default: 20,000)")
    parser.add_argument("--seed", type=int, help="of the first batch (default: another one each time)")
    options = parser.parse_args()
    number = random.randrange(10**9) if options.seed is None else options.seed
    print(f"at least {options.programs:,} programs from seed {number}", flush=True)
    started, done = time.perf_counter(), 0
    while done < options.programs:
        try:
            done += run_batch(number)
        except BaseException:
            print(f'\nfailed; to see it again: make fuzz ARGS="--seed {number} --programs 1"', flush=True)
            raise
        print(f"{done:,} programs in {time.perf_counter() - started:.0f} s, up to seed {number}", flush=True)
        number += 1
    print("all of them as they should be")


if __name__ == "__main__":
    main()
