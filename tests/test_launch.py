"""How often a worker that was killed is started again."""

from sweeps.launch import HEALTHY_SECONDS, MAX_RESTARTS, Restarts


def test_a_worker_that_dies_at_its_start_is_given_up_for_good() -> None:
    now = [0.0]
    restarts = Restarts(2, clock=lambda: now[0])
    for _ in range(MAX_RESTARTS):
        restarts.note_start(0)
        now[0] += 1
        assert restarts.again(0)
    restarts.note_start(0)
    assert not restarts.again(0)
    now[0] += 10 * HEALTHY_SECONDS
    assert not restarts.again(0)
    assert restarts.again(1)


def test_a_worker_that_has_worked_for_a_while_is_started_again_without_end() -> None:
    now = [0.0]
    restarts = Restarts(1, clock=lambda: now[0])
    for _ in range(5 * MAX_RESTARTS):
        restarts.note_start(0)
        now[0] += HEALTHY_SECONDS + 1
        assert restarts.again(0)
