"""The control channel's messages: their bytes, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core import messages as m
from migrate.core.confinement import UNLIMITED, Confinements, Sheet
from migrate.errors import ProtocolError
from migrate.network_identity import (
    HeldFrame,
    Interface,
    InterfaceAddress,
    Neighbour,
    NetworkIdentity,
    Port,
    Route,
)

if TYPE_CHECKING:
    from collections.abc import Callable

VERSIONS = m.Versions("6.12.0", "4.2.1", "runc 1.1.15", "x86_64")
NETWORK = NetworkIdentity(
    hostname="sheep",
    interfaces=(
        Interface(
            name="eth0",
            kind="veth",
            mac="02:00:00:00:00:05",
            mtu=1500,
            up=True,
            addresses=(InterfaceAddress("10.0.0.5/24", broadcast="10.0.0.255"),),
            index=2,
        ),
    ),
    routes=(Route("inet", "default", "10.0.0.1", "eth0"),),
    neighbours=(Neighbour("eth0", "10.0.0.1", "02:00:00:00:00:01", 2),),
    ports=(Port("eth0", "v-sheep", "br0"),),
)
OPEN = m.OpenSession(
    migration_id="m1",
    container="sheep",
    runtime="runc",
    attempt=7,
    host="alpha",
    config_json='{"ociVersion":"1.0.2"}',
    tasks=(1, 7),
    memory_bytes=1 << 30,
    shared_bytes=4096,
    rootfs_bytes=123456,
    streams=4,
    restore="lazy",
    network=NETWORK,
    versions=VERSIONS,
    cpuinfo=b"\x01\x02",
    patience_s=30.0,
    labels=("web (enforce)",),
)
OPEN_BYTES = (
    b'{"type":"open_session","migration_id":"m1","container":"sheep","runtime":"runc","attempt":7,'
    b'"host":"alpha","config_json":"{\\"ociVersion\\":\\"1.0.2\\"}","tasks":[1,7],'
    b'"memory_bytes":1073741824,"shared_bytes":4096,'
    b'"rootfs_bytes":123456,"streams":4,"restore":"lazy","network":{"hostname":"sheep","interfaces":'
    b'[{"name":"eth0","kind":"veth","mac":"02:00:00:00:00:05","mtu":1500,"up":true,"addresses":'
    b'[{"network":"10.0.0.5/24","broadcast":"10.0.0.255","scope":0,"flags":0}],"index":2}],"routes":'
    b'[{"family":"inet","destination":"default","gateway":"10.0.0.1","device":"eth0","source":null,'
    b'"metric":0,"scope":0,"table":254,"protocol":3,"onlink":false,"kind":"unicast","mtu":0}],'
    b'"neighbours":[{"device":"eth0","address":"10.0.0.1","mac":"02:00:00:00:00:01","state":2}],'
    b'"ports":[{"interface":"eth0","host_end":"v-sheep","bridge":"br0"}],"sysctls":{}},"versions":'
    b'{"kernel":"6.12.0","criu":"4.2.1","runtime":"runc 1.1.15","architecture":"x86_64"},"cpuinfo":'
    b'"AQI=","dry_run":false,"patience_s":30.0,"labels":["web (enforce)"],"protocol":1}'
)

CONFINEMENT = Confinements(
    (
        Sheet(
            users=(0, 0, 0, 0),
            groups=(0, 0, 0, 0),
            more_groups=(10,),
            inheritable=0,
            permitted=5,
            effective=5,
            bounding=5,
            ambient=0,
            no_new_privileges=True,
            seccomp=2,
            filters=1,
            label="",
            user_map="0 0 4294967295",
            group_map="0 0 4294967295",
            setgroups="allow",
            oom_score_adj=0,
            limits={"Max open files": (1024, UNLIMITED)},
        ),
    ),
    {1: 0, 7: 0},
)
FROM_SOURCE: list[tuple[m.SourceMessage, bytes]] = [
    (OPEN, OPEN_BYTES),
    (
        msgspec.structs.replace(
            OPEN,
            copy_of=m.CopyOf("ram", (("10.0.0.4", "10.0.0.5"),), beside="m0", number=1, fill=False),
        ),
        OPEN_BYTES[:-1] + b',"copy_of":{"container":"ram","renamed":[["10.0.0.4","10.0.0.5"]]'
        b',"beside":"m0","number":1,"fill":false}}',
    ),
    (
        msgspec.structs.replace(OPEN, copy_of=m.CopyOf("ram", (), "fresh", "USR1")),
        OPEN_BYTES[:-1]
        + b',"copy_of":{"container":"ram","renamed":[],"hook":"fresh","signal":"USR1","number":0,'
        b'"fill":true}}',
    ),
    (
        m.Prepare(("/dev/null", "pipe:[5]", "pipe:[6]")),
        b'{"type":"prepare","descriptors":["/dev/null","pipe:[5]","pipe:[6]"]}',
    ),
    (
        m.Restore(b"said", b"s" * 63 + b"!", b"who", 5, CONFINEMENT),
        b'{"type":"restore","manifest":"c2FpZA==","signature":"'
        + b"c3Nz" * 21
        + b'IQ==","certificate":"d2hv","lazy_pages":5,'
        b'"confinement":{"sheets":[{"users":[0,0,0,0],"groups":[0,0,0,0],"more_groups":[10],'
        b'"inheritable":0,"permitted":5,"effective":5,"bounding":5,"ambient":0,'
        b'"no_new_privileges":true,"seccomp":2,"filters":1,"label":"","user_map":"0 0 4294967295",'
        b'"group_map":"0 0 4294967295","setgroups":"allow","oom_score_adj":0,'
        b'"limits":{"Max open files":[1024,-1]}}],"threads":{"1":0,"7":0}}}',
    ),
    (m.Commit("m1", 7), b'{"type":"commit","migration_id":"m1","attempt":7}'),
    (
        m.Frames("m1", 7, (HeldFrame("eth0", b"f" * 24),)),
        b'{"type":"frames","migration_id":"m1","attempt":7,"frames":[["eth0","'
        + b"ZmZm" * 8
        + b'"]]}',
    ),
    (
        m.Abort("m1", 7, "cancelled"),
        b'{"type":"abort","migration_id":"m1","attempt":7,"reason":"cancelled"}',
    ),
    (m.Ping(5), b'{"type":"ping","t_us":5}'),
    (m.Ask("m1", 7), b'{"type":"ask","migration_id":"m1","attempt":7}'),
    (
        m.State("m1", 7, "committed"),
        b'{"type":"state","migration_id":"m1","attempt":7,"name":"committed"}',
    ),
    (
        m.Recover("m1", "source"),
        b'{"type":"recover","migration_id":"m1","owner":"source"}',
    ),
    (m.Status("m1"), b'{"type":"status","migration_id":"m1"}'),
    (m.Cancel("m1"), b'{"type":"cancel","migration_id":"m1"}'),
    (m.Describe(), b'{"type":"describe"}'),
    (
        m.GiveBack("m1", "sheep"),
        b'{"type":"give_back","migration_id":"m1","container":"sheep","bandwidth_mib_s":null}',
    ),
    (
        m.Drain("start", ("beta",), 3, 60.0, bandwidth_mib_s=40.0),
        b'{"type":"drain","act":"start","to":["beta"],"parallel":3,"deadline_s":60.0,"shared":[],'
        b'"bandwidth_mib_s":40.0,"move_back":false,"dry_run":false}',
    ),
]
FROM_TARGET: list[tuple[m.TargetMessage, bytes]] = [
    (
        m.SessionOpened("m1", "ab" * 32, 7338, "beta", VERSIONS, 1 << 33),
        b'{"type":"session_opened","session_id":"m1","ticket":"'
        + b"ab" * 32
        + b'","data_port":7338,"host":"beta","versions":{"kernel":"6.12.0","criu":"4.2.1",'
        b'"runtime":"runc 1.1.15","architecture":"x86_64"},"free_memory_bytes":8589934592,'
        b'"cautions":[],"protocol":1}',
    ),
    (
        m.Refused((m.Refusal("memory", "too little memory", "free 1 GiB"),)),
        b'{"type":"refused","refusals":[{"code":"memory","message":"too little memory",'
        b'"remedy":"free 1 GiB"}]}',
    ),
    (m.Heard(3), b'{"type":"heard","messages":3}'),
    (m.Prepared(), b'{"type":"prepared"}'),
    (
        m.RestoreStage("post-restore", 5),
        b'{"type":"restore_stage","name":"post-restore","at_us":5}',
    ),
    (m.Held({"held": 5}), b'{"type":"held","marks":{"held":5}}'),
    (m.Running({"resumed": 6}), b'{"type":"running","marks":{"resumed":6}}'),
    (
        m.FillProgress(4096, 8192),
        b'{"type":"fill_progress","filled_bytes":4096,"total_bytes":8192}',
    ),
    (
        m.FillDone(12.5, 3, 8192, 40, 900),
        b'{"type":"fill_done","fill_ms":12.5,"faults":3,"filled_bytes":8192,'
        b'"fault_p50_us":40,"fault_p99_us":900}',
    ),
    (
        m.Failed(m.WireError("no CRIU", phase="preparing")),
        b'{"type":"failed","error":{"message":"no CRIU","phase":"preparing"}}',
    ),
    (m.Pong(5, 9), b'{"type":"pong","t_us":5,"now_us":9}'),
    (m.Ask("m1", 7), b'{"type":"ask","migration_id":"m1","attempt":7}'),
    (m.State("m1", 7, "held"), b'{"type":"state","migration_id":"m1","attempt":7,"name":"held"}'),
    (
        m.Standing("m1", "in_doubt", "alpha is silent"),
        b'{"type":"standing","migration_id":"m1","state":"in_doubt","peer":"alpha is silent",'
        b'"stopped":""}',
    ),
    (
        m.Overview(
            (m.Side("m1", "source", "c", "beta", 1, "done", 5.0, True, "", "", "moved", ""),)
        ),
        b'{"type":"overview","migrations":[{"migration_id":"m1","role":"source","container":"c",'
        b'"peer":"beta","attempt":1,"state":"done","since_wall_s":5.0,"ended":true,"driver":"",'
        b'"container_state":"","meaning":"moved","remedy":""}]}',
    ),
    (
        m.Description("beta", 1 << 33, 2.0, VERSIONS, ("runc",), ("br0",), ("ssd",), ("db",)),
        b'{"type":"description","host":"beta","free_memory_bytes":8589934592,"free_cpus":2.0,'
        b'"versions":{"kernel":"6.12.0","criu":"4.2.1","runtime":"runc 1.1.15",'
        b'"architecture":"x86_64"},"runtimes":["runc"],"bridges":["br0"],"labels":["ssd"],'
        b'"spread":["db"],"closed":""}',
    ),
    (
        m.GivingBack("m1", "undone", "it is gone"),
        b'{"type":"giving_back","migration_id":"m1","state":"undone","why":"it is gone",'
        b'"downtime_ms":null}',
    ),
    (
        m.Drained(
            "alpha", "drain-1", phase="moving", moves=(m.DrainMove("c", "runc", 4096, "waiting"),)
        ),
        b'{"type":"drained","host":"alpha","drain_id":"drain-1","asked":{"type":"drain",'
        b'"act":"show","to":[],"parallel":1,"deadline_s":null,"shared":[],'
        b'"bandwidth_mib_s":null,"move_back":false,"dry_run":false},"phase":"moving","began_wall_s":0.0,"exit_code":0,"why":"",'
        b'"cordoned":false,"is_driven":false,"moves":[{"container":"c","runtime":"runc",'
        b'"memory_bytes":4096,"state":"waiting","target":"","migration_id":"","why":"",'
        b'"begin_s":0.0,"seconds":0.0,"downtime_ms":null,"predicted_s":0.0,'
        b'"predicted_downtime_ms":null}]}',
    ),
]


@pytest.mark.parametrize(("message", "data"), FROM_SOURCE)
def test_bytes_of_the_source(message: m.SourceMessage, data: bytes) -> None:
    assert m.encode(message) == data
    assert m.decode_from_source(data) == message
    assert m.decode_from_source(data.decode()) == message


@pytest.mark.parametrize(("message", "data"), FROM_TARGET)
def test_bytes_of_the_target(message: m.TargetMessage, data: bytes) -> None:
    assert m.encode(message) == data
    assert m.decode_from_target(data) == message


def test_every_message_has_golden_bytes() -> None:
    assert {type(message) for message, _ in FROM_SOURCE} == set(m.SourceMessage.__args__)
    assert {type(message) for message, _ in FROM_TARGET} == set(m.TargetMessage.__args__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"type":"no_such"}',
        b'{"type":"held","marks":{}}',  # the other side's
        b'{"type":"ping"}',
        b'{"type":"ping","t_us":-1}',
        b'{"type":"ping","t_us":1152921504606846977}',
        b'{"type":"ping","t_us":1.5}',
        b'{"type":"ping","t_us":1,"more":2}',
        b'{"type":"ping","t_us":1}x',
        b'\xff{"type":"ping","t_us":1}',
        b'{"type":"state","migration_id":"m1","attempt":7,"name":"held\xff"}',
        b'{"type":"abort","migration_id":"m1","attempt":0,"reason":""}',
        b'{"type":"ask","migration_id":"../m1","attempt":7}',
        b'{"type":"commit","migration_id":"m1\\n","attempt":7}',
        b"[" * 100_000,
        b'{"type":"ping","t_us":' + b"[" * 100_000,
    ],
)
def test_what_the_target_refuses(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        m.decode_from_source(data)


def _change(path: tuple[str | int, ...], value: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _change(("container",), "sheep\n"),
        _change(("container",), "a" * 65),
        _change(("container",), "../sheep"),
        _change(("container",), ""),
        _change(("migration_id",), "a/b"),
        _change(("host",), "al pha"),
        _change(("host",), "alpha\n"),
        _change(("runtime",), "Runc"),
        _change(("attempt",), 0),
        _change(("tasks",), []),
        _change(("tasks",), [0]),
        _change(("tasks",), [1] * (m.MAX_TASKS + 1)),
        _change(("streams",), 0),
        _change(("streams",), 65),
        _change(("memory_bytes",), m.MAX_BYTES + 1),
        _change(("memory_bytes",), -1),
        _change(("restore",), "magic"),
        _change(("cpuinfo",), "not base64!"),
        _change(("config_json",), "x" * (m.MAX_CONFIG_CHARS + 1)),
        _change(("config_json",), None),
        _change(("network", "interfaces", 0, "name"), "../eth0"),
        _change(("network", "interfaces", 0, "mac"), "02:00:00:00:00"),
        _change(("network", "interfaces", 0, "extra"), 1),
        _change(("dry_run",), 1),
        _change(("patience_s",), -1),
        _change(("patience_s",), m.MAX_PATIENCE_S + 1),
    ],
)
def test_session_requests_that_are_refused(change: Callable[[Any], None]) -> None:
    document = json.loads(OPEN_BYTES)
    change(document)
    with pytest.raises(ProtocolError, match="cannot be read"):
        m.decode_from_source(json.dumps(document))


def test_another_protocol_is_refused_by_its_number_and_not_by_its_fields() -> None:
    document = json.loads(OPEN_BYTES) | {"protocol": 2, "something_new": True}
    with pytest.raises(ProtocolError, match="speaks protocol 2, this host 1"):
        m.decode_from_source(json.dumps(document))


@pytest.mark.parametrize(
    ("manifest", "signature_bytes", "certificate_bytes"),
    [
        (0, 64, 1),
        (1, 63, 1),
        (1, 65, 1),
        (1, 64, 0),
        (1, 64, 8193),
        (m.MAX_MANIFEST_BYTES + 1, 64, 1),
    ],
)
def test_restores_that_carry_no_signed_manifest(
    manifest: int, signature_bytes: int, certificate_bytes: int
) -> None:
    restore = m.Restore(
        bytes(manifest), bytes(signature_bytes), bytes(certificate_bytes), 0, CONFINEMENT
    )
    with pytest.raises(ProtocolError):
        m.decode_from_source(m.encode(restore))


def test_a_message_that_is_too_large_is_refused_on_both_ends() -> None:
    data = b'{"type":"ping","t_us":1}' + b" " * m.MAX_MESSAGE_BYTES
    with pytest.raises(ProtocolError, match="larger than"):
        m.decode_from_source(data)
    with pytest.raises(ProtocolError, match="larger than"):
        m.encode(m.Restore(bytes(m.MAX_MESSAGE_BYTES), bytes(64), b"who", 0, CONFINEMENT))


def test_the_largest_session_request_fits() -> None:
    """What the limits allow of the large parts, at once, is within the limit of a message."""
    config_json = '"' * m.MAX_CONFIG_CHARS
    request = msgspec.structs.replace(
        OPEN,
        config_json=config_json,
        tasks=(1 << 22,) * m.MAX_TASKS,
        cpuinfo=bytes(m.MAX_CPUINFO_BYTES),
    )
    assert m.decode_from_source(m.encode(request)) == request


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (m.decode_from_source, m.decode_from_target):
        try:
            decode(data)
        except ProtocolError:
            continue


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    st.sampled_from([data for _, data in FROM_SOURCE + FROM_TARGET]),
    st.data(),
)
def test_messages_with_a_changed_field_are_read_or_refused(
    golden: bytes, data: st.DataObject
) -> None:
    document = json.loads(golden)
    key = data.draw(st.sampled_from(sorted(document)))
    document[key] = data.draw(json_values)
    text = json.dumps(document)
    for decode in (m.decode_from_source, m.decode_from_target):
        try:
            message = decode(text)
        except ProtocolError:
            continue
        assert m.encode(message)
