"""Whether large samples of stream v1 have the law that they should: see stream_statistics.py."""

import pytest
from stream_statistics import CASES, examine, law_of, short, verdict, writer


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {short(case.dtype)}")
def test_law(request, figure, main_device, quick, case):
    samples = request.config.getoption("--samples") or (1e11 if main_device.type == "cuda" else 1e8)
    samples = case.share * (2**19 if quick else samples)
    result = examine(case, writer(case), samples, law_of(case, main_device, samples))
    judged = verdict([result], of=len(CASES))
    noted = {name: result[name] for name in ("law", "p", "words")}
    with figure(f"{case.name} {result['dtype']}, {main_device}", "fastinit") as record:
        record([result["seconds"]], elements=result["samples"], verdict=judged, **noted)
    assert judged["passed"], judged
