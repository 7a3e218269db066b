"""One job of one trial: build, train, sample, measure."""
