"""Each class of errors of S3 servers and boto3 has its own advice, and no message repeats the server's text."""

import botocore.exceptions
import pytest
from botocore.exceptions import ClientError
from s3_server import SECRET, use_server

from icl.files.writing import StorageError
from icl.store.s3 import S3Store
from icl.store.s3_errors import describe_failure, describe_refusal


def refusal(code: str, status: int) -> str:
    answer = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}
    said = describe_refusal(ClientError(answer, "PutObject"))
    assert SECRET not in said
    return said


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("RequestTimeTooSkewed", 403, "set the clock"),
        ("InvalidArgument", 400, "AWS_ENDPOINT_URL"),
        ("InvalidRequest", 400, "AWS_ENDPOINT_URL"),
        ("NotImplemented", 501, "AWS_ENDPOINT_URL"),
        ("MethodNotAllowed", 405, "AWS_ENDPOINT_URL"),
        ("InvalidBucketName", 400, "does not allow this bucket name"),
        ("NoSuchBucket", 404, "does not exist"),
        ("404", 404, "does not exist"),
        ("AccessDenied", 403, "grant them the right to"),
        ("NewlyInvented", 403, "grant them the right to"),
        ("403", 403, "check AWS_ACCESS_KEY_ID"),
        ("401", 401, "check AWS_ACCESS_KEY_ID"),
        ("InvalidAccessKeyId", 403, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", 400, "renew"),
        ("InvalidToken", 400, "renew"),
        ("AccountProblem", 403, "account"),
        ("AuthorizationHeaderMalformed", 400, "AWS_DEFAULT_REGION"),
        ("PermanentRedirect", 301, "AWS_DEFAULT_REGION"),
        ("NewlyInvented", 302, "login page"),
        ("302", 302, "login page"),
        ("307", 307, "login page"),
        ("SlowDown", 503, "later"),
        ("503", 503, "later"),
        ("NewlyInvented", 599, "later"),
        ("RequestTimeout", 400, "later"),
        ("TooManyRequests", 429, "later"),
        ("BadDigest", 400, "proxy"),
        ("XAmzContentSHA256Mismatch", 400, "proxy"),
        ("QuotaExceeded", 403, "make room"),
        ("XMinioStorageFull", 507, "make room"),
        ("EntityTooLarge", 400, "larger"),
        ("413", 413, "larger"),
        ("KeyTooLongError", 400, "shorter"),
        ("InvalidObjectState", 403, "archive"),
        ("ObjectLocked", 403, "object lock"),
        ("KMS.DisabledException", 400, "KMS"),
        ("NewlyInvented", 418, "AWS_ENDPOINT_URL"),
    ],
)
def test_each_class_of_refusals_has_its_advice(code, status, advice):
    said = refusal(code, status)
    assert said.startswith(f"the server answered {code}: ")
    assert advice in said
    assert ("later" in said) == (advice == "later")


@pytest.mark.parametrize("code", [SECRET + "\n", "<b>", "", "a" * 99, 7, None])
def test_a_code_that_is_no_plain_word_is_not_repeated(code):
    assert refusal(code, 500).startswith(
        ("the server answered unknown: ", "the server answered 500: ", "the server answered 7: ")
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("NoCredentialsError", "AWS_ACCESS_KEY_ID"),
        ("SSOTokenLoadError", "aws sso login"),
        ("ProfileNotFound", "AWS_PROFILE"),
        ("InvalidRegionError", "AWS_DEFAULT_REGION"),
        ("SSLError", "AWS_CA_BUNDLE"),
        ("ProxyConnectionError", "HTTPS_PROXY"),
        ("InvalidMaxRetryAttemptsError", "AWS_MAX_ATTEMPTS"),
        ("ReadTimeoutError", "check the network"),
        ("EndpointConnectionError", "check the network"),
        ("ConnectionClosedError", "check the network"),
    ],
)
def test_each_class_of_failures_has_its_advice(name, advice):
    kind = getattr(botocore.exceptions, name)
    said = describe_failure(kind.__new__(kind))
    assert advice in said


def test_every_failure_of_botocore_is_a_sentence():
    kinds = [kind for kind in vars(botocore.exceptions).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, Exception):
            assert describe_failure(kind.__new__(kind))


@pytest.mark.parametrize("name", ["My_Bucket!", "a b", "a" * 300, "x..", "ä"])
def test_a_bad_name_of_a_bucket_is_not_blamed_on_the_network(s3, name):
    with pytest.raises(StorageError) as error:
        S3Store(name).check()
    said = str(error.value)
    assert "network" not in said
    assert "bucket" in said.partition("cannot be used")[2]


def test_a_certificate_that_is_not_trusted_is_said_to_be(s3, monkeypatch, tmp_path):
    from tests.reliability.stand_ins import StandIn, start

    proxy, _ = start(StandIn("plain", over_tls=True), s3.endpoint, tmp_path)
    use_server(monkeypatch, proxy.endpoint)
    with pytest.raises(StorageError, match="certificate is not trusted; set AWS_CA_BUNDLE"):
        S3Store(s3.bucket).check()
    proxy.close()
