"""Grokking itself: the preset quick shows the whole curve, in about a minute on one core."""
import json

import train_grokking


def test_the_quick_preset_memorizes_first_and_groks_later(tmp_path):
    """Training accuracy is at 99 % by step 600 (measured: 200), validation accuracy below 50 % at 1,000 (5 %), and at
    99 % by 4,500 (2,950 to 3,650 over four seeds). fp32, so that no hardware's bf16 plays a part."""
    flags = ["--preset", "quick", "--seed", "1", "--threads", "1", "--device", "cpu", "--log-dir", str(tmp_path),
             "--iterations", "4500", "--no-plot"]
    assert train_grokking.main(flags) == 0
    (path,) = tmp_path.glob("*/*/metrics.json")
    result = json.loads(path.read_text())
    found, accuracy = result["milestones"], {m["step"]: m["val_acc"] for m in result["metrics"]}
    assert found["train_99"] <= 600 and accuracy[1000] < 0.5 and 1500 < found["val_99"] <= 4500
    assert found["gap"] > 1000 and result["status"] in ("target", "done")
