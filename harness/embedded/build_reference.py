"""Compute the features of the embedded data set's real images again and write them into the package.

python -m harness.embedded.build_reference    takes a minute; the file is committed, so nobody else needs to
"""

import argparse
import logging


def main() -> None:
    """Write the file that `harness.metrics.fidelity.reference` ships."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from harness import data
    from harness.metrics.extractors.effnet import extractor_id
    from harness.metrics.fidelity.reference import SHIPPED, write_reference

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = data.load("emoji", "reference")
    key = {"data": images.fingerprint, "extractor": extractor_id()}
    write_reference(SHIPPED, images.images, key, lambda done, total: logging.info("%d of %d images", done, total))


if __name__ == "__main__":
    main()
