import pytest
import torch
import torch.nn.functional as F

from asg_env.core import evaluation

ONES = (1.0, 1.0, 1.0)


@pytest.mark.parametrize("split", ["train", "inner_valid", "outer_valid", "test"])
def test_evaluate_scores_the_new_head(make_trainer, tiny_splits, split):
    trainer = make_trainer()
    trainer.run(3, ONES)
    data = tiny_splits[split]
    with torch.no_grad():
        logits = trainer.optimizee(data.batch(slice(None)))[0]
    right = logits.argmax(dim=1) == data.labels

    result = trainer.evaluate(split)

    assert torch.equal(result.correct, right)
    assert result.accuracy == pytest.approx(right.float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)


def test_evaluate_scores_old_task_through_the_old_head(make_trainer, tiny_splits):
    trainer = make_trainer()
    trainer.run(3, ONES)
    data = tiny_splits["old_task"]
    with torch.no_grad():
        logits = trainer.optimizee(data.batch(slice(None)))[1]

    result = trainer.evaluate("old_task")

    assert torch.equal(result.correct, logits.argmax(dim=1) == data.labels)
    assert result.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)


def test_evaluate_counts_every_image_whatever_the_batches(make_trainer, monkeypatch):
    trainer = make_trainer()
    whole = trainer.evaluate("inner_valid")
    monkeypatch.setattr(evaluation, "LARGEST_BATCH", 5)
    monkeypatch.setattr(evaluation, "SMALLEST_BATCH", 5)

    parts = trainer.evaluate("inner_valid")

    assert torch.equal(whole.correct, parts.correct)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)


def test_agreement_is_the_share_of_equal_predictions(make_trainer, build_optimizee, tiny_splits):
    trainer = make_trainer({}, base_lr=1.0)
    assert trainer.agreement("old_task") == 1.0
    assert trainer.agreement("outer_valid") == 1.0
    trainer.run(10, ONES)
    batch = tiny_splits["old_task"].batch(slice(None))
    with torch.no_grad():
        old, new = build_optimizee()(batch)[1], trainer.optimizee(batch)[1]

    share = (old.argmax(dim=1) == new.argmax(dim=1)).float().mean().item()

    assert trainer.agreement("old_task") == pytest.approx(share)
    assert share < 1.0


def test_measuring_does_not_disturb_training(make_trainer, weights, identical):
    watched, alone = make_trainer(), make_trainer()
    reports = []
    for trainer in (watched, alone):
        reports.append([])
        for _ in range(3):
            reports[-1].append(trainer.run(2, ONES))
            if trainer is watched:
                before = weights(trainer)
                for split in trainer.splits:
                    trainer.evaluate(split)
                    trainer.agreement(split)
                trainer.initial_report(2)
                assert identical(weights(trainer), before)

    assert reports[0] == reports[1]
    assert identical(weights(watched), weights(alone))


def test_schedule_free_training_is_not_changed_by_evaluating_it(make_trainer, weights):
    quiet, watched = (make_trainer(optimizer="schedule-free") for _ in range(2))
    for _ in range(3):
        quiet.run(3, [1.0] * 3)
        watched.run(3, [1.0] * 3)
        watched.evaluate("test")

    assert all(torch.equal(weights(quiet)[n], t) for n, t in weights(watched).items())


def test_schedule_free_networks_are_judged_and_saved_at_their_average(make_trainer, weights):
    trainer = make_trainer(optimizer="schedule-free")
    trainer.run(6, [1.0] * 3)

    saved, training = trainer.weights(), weights(trainer)
    judged = trainer.evaluate("test").loss
    trainer.optimizee.load_state_dict(saved)

    assert not torch.equal(saved["head.0.weight"], training["head.0.weight"])
    plain = make_trainer()
    plain.optimizee.load_state_dict(saved)
    assert plain.evaluate("test").loss == judged


def test_features_are_what_the_heads_read(make_trainer):
    trainer = make_trainer()
    trainer.run(2, [1.0] * 3)
    features = trainer.features("test", 100)

    with torch.no_grad():
        logits = trainer.optimizee.head(features)
    labels = trainer.splits["test"].labels
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(trainer.evaluate("test").loss, rel=1e-6)


def test_features_of_a_part_of_a_split_are_balanced_over_classes(make_trainer, tiny_splits):
    # Sorted by class, as lists of images are.
    rows = tiny_splits["test"].labels.argsort(stable=True)
    trainer = make_trainer(splits={**tiny_splits, "test": tiny_splits["test"].select(rows)})

    part = trainer.features("test", 6)

    whole = trainer.features("test", 12)
    torch.testing.assert_close(part, whole[[0, 4, 8, 1, 5, 9]])
