"""One node of the membership protocol, event by event. Most cases were found by the simulation (tests/simulation)."""

from __future__ import annotations

from dataclasses import replace

from training.cluster.node import Node
from training.cluster.protocol import (
    Action,
    AskWorkers,
    Event,
    Heard,
    Leave,
    Linked,
    Preempted,
    Propose,
    RecordSeen,
    StartWorkers,
    Status,
    Tell,
    Tick,
    Timing,
    Unlinked,
    WorkersEnded,
)
from training.runs.record import Member, Record

TIMING = Timing()


def member(node: int, name: str | None = None, port: int = 1) -> Member:
    return Member(node=node, incarnation=name or str(node), address="a", port=port)


def group(token: int, *members: Member) -> Record:
    return Record(key="k", token=token, members=members, num_nodes=len(members))


class Driver:
    """A node, a clock, and peers that all reach one another unless told otherwise."""

    def __init__(self, number: int = 0, *, num_nodes: int = 3, min_nodes: int = 1, nodes_per_replica: int = 1) -> None:
        self.now = 1000.0
        self.node = Node(
            me=member(number),
            num_nodes=num_nodes,
            min_nodes=min_nodes,
            nodes_per_replica=nodes_per_replica,
            generation=0,
            max_restarts=20,
            timing=TIMING,
            since=self.now,
        )

    def send(self, event: Event, *, after: float = 0.01) -> list[Action]:
        self.now += after
        return self.node.handle(event, self.now)

    def sees(self, record: Record | None) -> list[Action]:
        return self.send(RecordSeen(maybe_record=record))

    def links(self, *names: str) -> None:
        for name in names:
            self.send(Linked(incarnation=name))

    def waits(self, seconds: float, *keep: Status) -> list[Action]:
        """Time goes by; those in `keep` are heard all the while, the store is as it was."""
        actions = []
        for _ in range(round(seconds / 0.5)):
            for status in keep:
                actions += self.send(Heard(status=status), after=0.0)
            actions += self.send(Tick(), after=0.5)
            if self.node._is_asking:
                actions += self.send(RecordSeen(maybe_record=self.node.maybe_record), after=0.0)
        return actions

    def status(self, who: Member, *reaches: str, **changes: object) -> Status:
        base = Status(
            member=who,
            token=self.node.maybe_record.token if self.node.maybe_record else 0,
            phase="idle",
            reaches=reaches or tuple(sorted({self.node.me.incarnation, *self.node.peers} - {who.incarnation})),
            sees_store=True,
            is_leaving=False,
            step=0,
            maybe_departure=None,
        )
        return replace(base, **changes)  # type: ignore[arg-type]

    def hears(self, who: Member, *reaches: str, **changes: object) -> list[Action]:
        return self.send(Heard(status=self.status(who, *reaches, **changes)))


def proposed(actions: list[Action]) -> list[list[str]]:
    """Who is in each proposal."""
    return [[m.incarnation for m in a.proposal.members] for a in actions if isinstance(a, Propose)]


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions if type(action).__name__ != "Tell"]


def in_training(number: int = 0, *others: int, token: int = 1) -> Driver:
    """A node whose group trains."""
    driver = Driver(number)
    names = [str(other) for other in others]
    driver.links(*names)
    record = group(token, *(member(node) for node in sorted((number, *others))))
    assert "StartWorkers" in kinds(driver.sees(record))
    for other in others:
        driver.hears(member(other), phase="training")
    assert driver.node.phase == "training"
    return driver


# ---- who starts, and on which port -----------------------------------------------------------------------------------


def test_a_member_starts_even_if_another_is_not_there_so_that_no_port_serves_two_groups() -> None:
    """Seed 424: the proposer waited in vain for a member that had left, and proposed its own port a second time. A
    worker of the first group would have found the second one's store there."""
    driver = Driver()
    actions = driver.sees(group(5, member(0), member(1)))
    assert kinds(actions)[:1] == ["StartWorkers"]
    assert kinds(driver.send(Tick())) == ["StopWorkers"]
    driver.links("2")
    assert not proposed(driver.hears(member(2)))
    actions = driver.send(WorkersEnded(me=member(0, port=2)))
    [proposal] = [action.proposal for action in actions if isinstance(action, Propose)]
    assert proposal.members[0].port == 2


# ---- news of a group -------------------------------------------------------------------------------------------------


def news_told(actions: list[Action]) -> list[Record]:
    told = [action.status.maybe_news for action in actions if isinstance(action, Tell)]
    return [news for news in told if news is not None]


def test_the_first_member_of_a_new_group_tells_it_once_without_the_secret_and_no_other_does() -> None:
    for number, num_told in ((0, 1), (1, 0)):
        driver = Driver(number)
        driver.links(str(1 - number))
        driver.sees(replace(group(0), secret="s"))
        after = driver.sees(replace(group(1, member(0), member(1)), secret="s"))
        assert [news.secret for news in news_told(after)] == [""] * num_told
        assert not news_told(driver.send(Tick(), after=TIMING.beat))


def test_who_hears_of_its_group_starts_without_reading_the_record() -> None:
    driver = Driver(1)
    driver.links("0")
    driver.sees(replace(group(0), secret="s"))
    news = group(1, member(0), member(1))
    actions = driver.hears(member(0), phase="training", token=1, maybe_news=news)
    assert [a.record for a in actions if isinstance(a, StartWorkers)] == [replace(news, secret="s")]
    assert "ReadRecord" not in kinds(actions)


def test_neither_old_news_nor_a_read_that_was_under_way_bring_an_older_record_back() -> None:
    driver = Driver(2)
    driver.links("0")
    newest = group(3, member(0), member(1))
    driver.sees(newest)
    driver.hears(member(0), token=2, maybe_news=group(2, member(0), member(2)))
    assert driver.node.maybe_record == newest
    driver.sees(group(2, member(0), member(2)))
    assert driver.node.maybe_record == newest


def test_news_of_another_generation_or_for_who_knows_no_record_count_nothing() -> None:
    news = replace(group(1, member(0), member(1)), generation=1)
    driver = Driver(1)
    driver.links("0")
    for known in (None, group(0)):
        driver.sees(known)
        assert "StartWorkers" not in kinds(driver.hears(member(0), token=1, maybe_news=news))


# ---- newcomers -------------------------------------------------------------------------------------------------------


def ready_newcomer(driver: Driver, who: Member) -> list[Action]:
    driver.links(who.incarnation)
    for other in driver.node.maybe_group.members if driver.node.maybe_group else ():
        if other.incarnation != driver.node.me.incarnation:
            driver.hears(other, phase="training")
    return driver.hears(who) + driver.send(Tick(), after=0.3)


def test_a_group_that_trains_takes_a_newcomer_in() -> None:
    assert AskWorkers(to="regroup") in ready_newcomer(in_training(0, 1), member(2))


def test_nobody_is_taken_in_while_the_store_is_away_for_the_group_could_not_go_on() -> None:
    """Seed 1746."""
    driver = in_training(0, 1)
    driver.sees(None)
    assert "AskWorkers" not in kinds(ready_newcomer(driver, member(2)))
    assert AskWorkers(to="regroup") in driver.sees(group(1, member(0), member(1)))


def test_a_replacement_of_a_node_that_is_in_the_group_is_no_newcomer() -> None:
    """It could not be in the next group either: the members would regroup for it again and again."""
    assert "AskWorkers" not in kinds(ready_newcomer(in_training(0, 1), member(1, "1-again")))


# ---- groups of whole replicas ----------------------------------------------------------------------------------------


def test_a_node_that_makes_no_whole_replica_waits() -> None:
    driver = Driver(num_nodes=4, nodes_per_replica=2)
    driver.sees(group(0))
    assert driver.node.maybe_want(driver.now) is None
    assert not proposed(driver.waits(TIMING.join + 2))
    assert "a group needs 2 nodes" in str(driver.node.maybe_want(driver.now))
    driver.links("1")
    assert driver.node.maybe_want(driver.now) is None
    assert proposed(driver.waits(TIMING.join + 2, driver.status(member(1))))[0] == ["0", "1"]


def test_nodes_beyond_whole_replicas_are_left_out() -> None:
    driver = Driver(num_nodes=4, nodes_per_replica=2)
    driver.sees(group(0))
    driver.links("1", "2")
    statuses = [driver.status(member(node)) for node in (1, 2)]
    assert proposed(driver.waits(TIMING.join + 2, *statuses))[0] == ["0", "1"]


def test_newcomers_that_make_no_whole_replica_are_not_taken_in() -> None:
    """Or the group would end for them again and again."""
    driver = in_training(0, 1)
    driver.node.num_nodes, driver.node.nodes_per_replica = 4, 2
    assert "AskWorkers" not in kinds(ready_newcomer(driver, member(2)))
    assert "AskWorkers" not in kinds(ready_newcomer(driver, member(3))), "2 does not reach 3 yet"
    assert "AskWorkers" in kinds(ready_newcomer(driver, member(2)))


# ---- what is told of the group before --------------------------------------------------------------------------------


def test_who_said_that_it_must_go_and_went_was_preempted_not_lost() -> None:
    """Seed 0: it counted as a restart in vain."""
    driver = in_training(0, 1)
    driver.hears(member(1), phase="training", is_leaving=True)
    driver.hears(member(1, port=2), is_leaving=True)
    driver.send(Unlinked(incarnation="1"))
    actions = driver.send(WorkersEnded(me=member(0, port=2), step=7)) + driver.waits(3)
    [proposal] = [action.proposal for action in actions if isinstance(action, Propose)][:1]
    assert [(d.node, d.class_name, d.step) for d in proposal.departures] == [(1, "Preempted", 7)]


def test_the_last_word_of_a_preempted_node_is_that_it_goes() -> None:
    driver = Driver()
    driver.links("1")
    driver.sees(group(0))
    tell, leave = driver.send(Preempted())
    assert isinstance(tell, Tell)
    assert tell.status.is_leaving
    assert leave == Leave(is_preempted=True)


# ---- taking over from a group that nobody reaches --------------------------------------------------------------------


def outsider(*, of: Record) -> Driver:
    driver = Driver(0)
    driver.sees(of)
    return driver


def test_a_group_without_a_sign_of_life_is_taken_over_from() -> None:
    driver = outsider(of=group(4, member(1), member(2)))
    assert not proposed(driver.waits(TIMING.takeover - 2))
    assert proposed(driver.waits(4))[0] == ["0"]


def test_a_sign_of_life_puts_that_off() -> None:
    lost = group(4, member(1), member(2))
    driver = outsider(of=lost)
    driver.waits(TIMING.takeover - 2)
    driver.sees(replace(lost, signs_of_life=1))
    assert not proposed(driver.waits(TIMING.takeover - 2))


def test_a_node_that_slept_does_not_take_over_for_what_it_missed() -> None:
    """Seed 9559: it woke, had seen no sign of life for long, and replaced a group that was well."""
    driver = outsider(of=group(4, member(1), member(2)))
    driver.waits(4)
    assert not proposed(driver.send(Tick(), after=2 * TIMING.takeover))
    assert not proposed(driver.waits(TIMING.takeover - 2))
    assert proposed(driver.waits(4))[0] == ["0"]


def test_nodes_that_were_all_placed_anew_need_not_wait() -> None:
    driver = outsider(of=group(4, member(0, "old"), member(1, "old too")))
    driver.links("1")
    assert proposed(driver.hears(member(1))) == [["0", "1"]]


def test_a_member_that_one_of_them_reaches_is_not_replaced() -> None:
    """Seed 13192: its memory would have been lost, for the sake of a link that came a moment later."""
    driver = outsider(of=group(4, member(0, "old"), member(1, "old too")))
    driver.links("1")
    assert not proposed(driver.hears(member(1), "0", "old too"))


def test_a_waiting_agent_that_was_replaced_and_is_cut_off_keeps_nobody_waiting() -> None:
    """Seed 99671: the node's new agent reached it, so it was to be a member; but the other node did not, for ever."""
    driver = outsider(of=group(4, member(0, "old"), member(1, "old too")))
    driver.links("old", "1")
    assert not proposed(driver.hears(member(0, "old"), "0"))
    assert proposed(driver.hears(member(1), "0")) == [["0", "1"]]


# ---- who proposes, and whom ------------------------------------------------------------------------------------------


def test_the_first_group_waits_for_all_but_not_for_ever() -> None:
    driver = Driver()
    driver.sees(group(0))
    driver.links("1")
    assert not proposed(driver.hears(member(1)))
    assert not proposed(driver.waits(TIMING.join - 2, driver.status(member(1))))
    assert proposed(driver.waits(4, driver.status(member(1))))[0] == ["0", "1"]


def test_all_there_are_proposed_at_once_by_the_lowest() -> None:
    for number, expected in ((0, [["0", "1", "2"]]), (1, [])):
        driver = Driver(number)
        driver.sees(group(0))
        others = [member(other) for other in range(3) if other != number]
        driver.links(*(other.incarnation for other in others))
        assert [p for other in others for p in proposed(driver.hears(other))] == expected


def test_the_next_one_proposes_if_the_lowest_does_not() -> None:
    driver = Driver(1, num_nodes=2)
    driver.sees(group(0))
    driver.links("0")
    assert not proposed(driver.hears(member(0)))
    assert proposed(driver.waits(3, driver.status(member(0))))[0] == ["0", "1"]


def test_a_node_that_few_reach_does_not_keep_the_others_waiting() -> None:
    """Node 0 reaches node 1 alone, and is too few with it; before, 1 to 3 waited for it to propose, for ever."""
    driver = Driver(1, num_nodes=4, min_nodes=3)
    driver.sees(group(0))
    driver.links("0", "2", "3")
    statuses = [
        driver.status(member(0), "1"),
        driver.status(member(2), "1", "3"),
        driver.status(member(3), "1", "2"),
    ]
    assert proposed(driver.waits(TIMING.join + 2, *statuses))[0] == ["1", "2", "3"]


def test_of_two_agents_of_a_node_the_member_of_the_last_group_goes_on() -> None:
    """It has the steps in memory."""
    driver = Driver(0)
    driver.links("old", "1")
    driver.sees(group(3, member(0, "old"), member(1, port=7)))
    driver.hears(member(1))
    assert not proposed(driver.hears(member(0, "old")))


def test_members_that_still_stop_are_waited_for() -> None:
    driver = Driver(0)  # a newcomer, for long
    driver.sees(group(3, member(1), member(2)))
    driver.links("1", "2")
    training = driver.status(member(2), phase="training")
    assert not proposed(driver.waits(5, driver.status(member(1), phase="training"), training))
    assert not proposed(driver.hears(member(1, port=2)))
    assert proposed(driver.hears(member(2, port=2))) == [["0", "1", "2"]]


def test_a_node_that_must_go_asks_for_a_checkpoint_even_if_its_group_is_about_to_regroup() -> None:
    """Seed 1206: the group ended without one, and with its members went what it had done since the last."""
    driver = in_training(0, 1)
    assert AskWorkers(to="regroup") in ready_newcomer(driver, member(2))
    assert AskWorkers(to="preempt") in driver.send(Preempted())
    assert "AskWorkers" not in kinds(driver.send(Tick()))


def test_an_agent_that_was_replaced_does_not_take_over_at_once_from_its_replacement() -> None:
    """Seed 701668: cut off from one another, the two took over from each other for ever, and no step remained."""
    driver = outsider(of=group(3, member(0)))
    driver.send(WorkersEnded(me=member(0, port=2)))
    assert not proposed(driver.sees(group(4, member(0, "replacement"))))
    assert not proposed(driver.waits(TIMING.takeover - 2))
