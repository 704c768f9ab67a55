"""What schemathesis needs to know about a monitor: see tests/tests/null_schemathesis.rs.

Environment variables: VESTA_API_SOCKET is the path of the API socket, VESTA_STATUSES that of a file
to which each answer's operation and status go, VESTA_DISK that of a disk, VESTA_DRIVE_ID and
VESTA_IFACE_ID are the ids of a drive and of a network interface.
"""

import os
import select
import signal
import socket

import requests
import schemathesis
import urllib3.connection
import urllib3.connectionpool

TIMEOUT = 30


class Connection(urllib3.connection.HTTPConnection):
    """A connection to the API socket."""

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(os.environ["VESTA_API_SOCKET"])


class Pool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = Connection


class Adapter(requests.adapters.HTTPAdapter):
    """Sends requests over the API socket, whatever host their URL has."""

    pool = Pool("localhost")

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        return self.pool


def mount(self, init=requests.Session.__init__):
    init(self)
    self.trust_env = False
    self.mount("http://", Adapter())


requests.Session.__init__ = mount


def prepared(value):
    """The value with paths below the monitor's directory, because a test leaves no file elsewhere,
    and with whole numbers as a client writes them: without a fraction, which the API refuses."""
    if isinstance(value, str):
        return value.lstrip("/").replace("..", "__")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [prepared(item) for item in value]
    if isinstance(value, dict):
        return {key: prepared(item) for key, item in value.items()}
    return value


@schemathesis.hook
def before_call(context, case, kwargs):
    if not isinstance(case.body, (str, list, dict)):
        return
    case.body = prepared(case.body)
    if not case.meta or not case.meta.generation.mode.is_positive:
        return
    # Random ids never agree, and then nothing else of the request is looked at.
    for name in ("drive_id", "iface_id"):
        if name in (case.path_parameters or {}) and isinstance(case.body, dict):
            if case.method == "PATCH":
                case.path_parameters[name] = os.environ["VESTA_" + name.upper()]
            case.body[name] = case.path_parameters[name]
    if case.path.startswith("/drives/") and isinstance(case.body, dict) and "path_on_host" in case.body:
        case.body["path_on_host"] = os.environ["VESTA_DISK"]


@schemathesis.hook
def after_call(context, case, response):
    """Notes the status, and ends the children of a fork."""
    with open(os.environ["VESTA_STATUSES"], "a") as statuses:
        print(case.method, case.path, response.status_code, file=statuses)
    if case.path == "/fork" and response.status_code == 200:
        for child in response.json()["children"]:
            if "pid" in child:
                process = os.pidfd_open(child["pid"])
                signal.pidfd_send_signal(process, signal.SIGKILL)
                if not select.select([process], [], [], TIMEOUT)[0]:
                    raise TimeoutError(f"a killed child still exists: {child}")
                os.close(process)


@schemathesis.check
def valid_bodies_are_read(ctx, response, case):
    """A body that fits its schema may be refused for its contents or at this time, but it is read:
    every field is known and has the right type."""
    if case.meta and case.meta.generation.mode.is_positive:
        assert "cannot be read" not in response.text, response.text


def resolved(schema, root):
    """The schemas that a schema, a reference or a choice stands for."""
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return resolved(target, root)
    if "anyOf" in schema:
        return [one for choice in schema["anyOf"] for one in resolved(choice, root)]
    return [schema]


def has_array_for_object(value, schema, root):
    """Whether there is an array where the schema has an object, at any depth."""
    for one in resolved(schema, root):
        kinds = one.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if isinstance(value, list):
            if "object" in kinds and "array" not in kinds:
                return True
            if any(has_array_for_object(item, one.get("items", {}), root) for item in value):
                return True
        if isinstance(value, dict):
            fields = one.get("properties", {})
            if any(has_array_for_object(item, fields.get(name, {}), root) for name, item in value.items()):
                return True
    return False


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Drops the one way in which the API accepts more than its description, as Firecracker does:
    the values of an object in the order of its fields, as an array."""
    if type(failure).__name__ != "AcceptedNegativeData":
        return True
    root = case.operation.schema.raw_schema
    body = root["paths"][case.path][case.method.lower()]["requestBody"]["content"]["application/json"]
    return not has_array_for_object(case.body, body["schema"], root)
