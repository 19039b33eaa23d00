"""Whether large samples of stream v1 have the law that they should: see stream_statistics.py."""

import pytest
from stream_statistics import CASES, examine, law_of, short, verdict, writer


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {short(case.dtype)}")
def test_law(request, record, main_device, quick, case):
    samples = request.config.getoption("--samples") or (1e11 if main_device.type == "cuda" else 1e8)
    samples = case.share * (2**19 if quick else samples)
    result = examine(case, writer(case), samples, law_of(case, main_device, samples))
    judged = verdict([result], of=len(CASES))
    name = f"{case.name} {result['dtype']}, {main_device}"
    info = record(name, "fastinit", [result["seconds"]], elements=result["samples"])
    info.update(verdict=judged, law=result["law"], p=result["p"], words=result["words"])
    assert judged["passed"], judged
