"""
Starts the page of `modeling-can demo`, on a Space or from a checkout:

    python demo/app.py                                              # the quickstart's model, out/can-quickstart
    python demo/app.py --model_name_or_path FOLDER_OR_HUB_ID
"""

from modeling_can.demo import main
from modeling_can.progress import report_errors


if __name__ == "__main__":
    with report_errors("demo/app.py"):
        main(description=__doc__)
