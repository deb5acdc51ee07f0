def report(run, resamples=1000):
    return run / "report" / "index.html"
