"""Explain errors of S3 servers in one sentence that says what to do.

The sentences quote only an error's code. They do not quote messages of the server or of boto3, because such messages could contain
secrets. If a code is not in the table, the explanation depends on the HTTP status.
"""

import os
import re
from typing import Any

from icl.files.redaction import redact

_BUCKET = "the bucket does not exist; make it, or correct AWS_BUCKET_NAME or checkpoints.store"
_NAME = "the server does not allow this bucket name; correct it (3 to 63 lowercase letters, digits, dots and hyphens)"
_RIGHTS = "these credentials do not allow this operation; grant them the right to list, read, write and delete below the prefix"
_KEYS = "the server does not accept these credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and this machine's clock"
_EXPIRED = (
    "the credentials have expired or are not valid for this server; renew them (AWS_SESSION_TOKEN, or `aws sso login`)"
)
_ACCOUNT = "the account is not active or may not use the server; ask the server's administrator"
_CLOCK = "this machine's clock differs too much from the server's; set the clock (for instance by NTP)"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to the bucket's region"
_ELSEWHERE = (
    "the server redirects requests; correct AWS_ENDPOINT_URL if it is the address of a login page or a proxy, "
    "and AWS_DEFAULT_REGION if the bucket is in another region"
)
_LATER = "the server is busy or out of order; run the same command again later"
_ALTERED = "the bytes that arrived differ from the bytes that were sent; if this happens again, look for a proxy that alters them"
_FULL = "the store is full, or its quota is used up; make room in it, or choose another store"
_LARGE = "a file is larger than the server accepts; raise the server's limit, or choose another store"
_LONG = "the name is too long for the server; choose a shorter --run_name or prefix"
_ARCHIVED = "the object is in an archive; restore it, or change the bucket's lifecycle rule"
_LOCKED = "the bucket does not allow objects to be replaced or removed; choose a bucket without object lock"
_ENCRYPTION = "the bucket's encryption key cannot be used; check the KMS key, and whether these credentials may use it"
_NOT_S3 = "the server does not understand a request that icl needs; check that AWS_ENDPOINT_URL is the address of its S3 service"
_SIGNATURE = "the secret key does not match the access key; check AWS_SECRET_ACCESS_KEY"
_UNKNOWN_KEY = "the server does not know this access key; check AWS_ACCESS_KEY_ID"

_ADVICE = {
    _BUCKET: "NoSuchBucket NoSuchWebsiteConfiguration",
    _NAME: "InvalidBucketName InvalidBucketOwnerAWSAccountID InvalidDNSName",
    _RIGHTS: "AccessDenied AccessDeniedException AllAccessDisabled AccessForbidden UnauthorizedAccess InvalidPayer "
    "RequestNotAllowed NotAuthorized OperationNotPermitted UnauthorizedOperation",
    _KEYS: "401 403 Forbidden Unauthorized AuthFailure InvalidSecurity InvalidCredentials CredentialsNotSupported "
    "MissingSecurityHeader MissingSecurityElement MissingAuthenticationToken AuthorizationQueryParametersError "
    "InvalidClientTokenId UnrecognizedClientException UnauthorizedAccessError AccessKeyDisabled IncompleteSignature",
    _UNKNOWN_KEY: "InvalidAccessKeyId NoSuchAccessKey InvalidAccessKey",
    _SIGNATURE: "SignatureDoesNotMatch InvalidSignature",
    _EXPIRED: "ExpiredToken ExpiredTokenException InvalidToken TokenRefreshRequired RequestExpired TokenCodeInvalidError "
    "TokenExpired InvalidIdentityToken",
    _ACCOUNT: "AccountProblem NotSignedUp OptInRequired SubscriptionRequired AccountSuspended UserSuspended Suspended",
    _CLOCK: "RequestTimeTooSkewed RequestInTheFuture RequestNotYetValid",
    _REGION: "PermanentRedirect TemporaryRedirect Redirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
    "InvalidRegion",
    _ELSEWHERE: "301 302 303 307 308",
    _LATER: "SlowDown SlowDownRead SlowDownWrite ServiceUnavailable InternalError InternalFailure InternalServerError "
    "ServerBusy Busy OperationAborted RequestTimeout RequestTimeoutException PriorRequestNotComplete "
    "Throttling ThrottlingException ThrottledException RequestThrottled RequestThrottledException TooManyRequests "
    "TooManyRequestsException RequestLimitExceeded LimitExceededException BandwidthLimitExceeded EC2ThrottledException "
    "ProvisionedThroughputExceededException TransactionInProgressException NoSuchUpload InvalidPart InvalidPartOrder "
    "XMinioServerNotInitialized XMinioReadQuorum XMinioWriteQuorum ConditionalRequestConflict 408 409 429 500 502 503 504 "
    "520 521 522 523 524",
    _ALTERED: "BadDigest InvalidDigest IncompleteBody XAmzContentSHA256Mismatch XAmzContentChecksumMismatch "
    "ContentSHA256Mismatch ChecksumMismatch",
    _FULL: "QuotaExceeded XMinioStorageFull XMinioAdminBucketQuotaExceeded StorageFull InsufficientStorage "
    "InsufficientStorageSpace StorageLimitExceeded StorageCapExceeded StorageQuotaExceeded TotalStorageExceeded "
    "BucketQuotaExceeded NoSpaceLeft TooManyObjects 507",
    _LARGE: "EntityTooLarge MaxMessageLengthExceeded RequestEntityTooLarge 413",
    _LONG: "KeyTooLongError KeyTooLong InvalidObjectName XMinioInvalidObjectName 414",
    _ARCHIVED: "InvalidObjectState ObjectNotInActiveTierError RestoreInProgress",
    _LOCKED: "ObjectLocked InvalidRetentionPeriod ObjectUnderRetention FileLocked ObjectAlreadyExists FileAlreadyExists "
    "FileImmutable ObjectImmutable InvalidBucketState",
    _ENCRYPTION: "KMS.DisabledException KMS.NotFoundException KMS.KMSInvalidStateException KMS.InvalidKeyUsageException "
    "KMS.ThrottlingException KMSKeyNotFound InvalidKMSKey XMinioKMSNotConfigured KMSNotConfigured",
}
_BY_CODE = {code: advice for advice, codes in _ADVICE.items() for code in codes.split()}
_BY_STATUS = {401: _KEYS, 403: _RIGHTS, 404: _BUCKET, 408: _LATER, 413: _LARGE, 414: _LONG, 429: _LATER, 507: _FULL}

_NO_CREDENTIALS = "there are no credentials; set AWS_PROFILE, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for instance in `.env`"
_LOGIN = "the login of AWS_PROFILE cannot be used; renew it (`aws sso login`)"
_PROFILE = "boto3's settings cannot be read; check AWS_PROFILE, AWS_CONFIG_FILE and the files in ~/.aws"
_SETTING = (
    "a setting of boto3 is not valid; check the AWS_... variables, such as AWS_MAX_ATTEMPTS, and the files in ~/.aws"
)
_BY_FAILURE = {
    _NO_CREDENTIALS: "NoCredentialsError PartialCredentialsError CredentialRetrievalError MetadataRetrievalError "
    "NoAuthTokenError",
    _LOGIN: "TokenRetrievalError SSOError SSOTokenLoadError UnauthorizedSSOTokenError LoginError LoginRefreshRequired "
    "LoginInsufficientPermissions LoginTokenLoadError LoginAuthorizationCodeError UnknownTokenProviderError "
    "RefreshWithMFAUnsupportedError MissingDependencyException",
    _PROFILE: "ProfileNotFound ConfigNotFound ConfigParseError InvalidConfigError InfiniteLoopConfigError "
    "UnknownCredentialError",
    _NAME: "ParamValidationError InvalidDNSNameError InvalidHostLabelError UnsupportedS3ArnError "
    "UnsupportedS3AccesspointConfigurationError UnsupportedOutpostResourceError",
    _ELSEWHERE: "RecursionError",  # if a redirect names no region, botocore follows it endlessly
    "AWS_DEFAULT_REGION is not the name of a region; correct it": "InvalidRegionError UnknownRegionError NoRegionError "
    "UnknownEndpointError",
    "AWS_ENDPOINT_URL is not the address of a server, such as https://host:9000; correct it": "ValueError UnicodeError "
    "InvalidURL LocationParseError LocationValueError InvalidEndpointConfigurationError EndpointResolutionError "
    "EndpointProviderError",
    "the server's certificate is not trusted; set AWS_CA_BUNDLE to the authority's certificate, or correct AWS_ENDPOINT_URL": "SSLError",
    "the proxy does not answer; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY": "ProxyConnectionError "
    "InvalidProxiesConfigError",
    "the answer does not come from an S3 server; check that AWS_ENDPOINT_URL is the address of its S3 service": "ResponseParserError "
    "PaginationError",
    _ALTERED: "FlexibleChecksumError ChecksumError AwsChunkedWrapperError",
    _SETTING: "InvalidRetryConfigurationError InvalidMaxRetryAttemptsError InvalidRetryModeError InvalidDefaultsMode "
    "InvalidS3AddressingStyleError InvalidChecksumConfigError InvalidS3UsEast1RegionalEndpointConfigError "
    "InvalidSTSRegionalEndpointsConfigError InvalidIMDSEndpointError InvalidIMDSEndpointModeError "
    "UnsupportedS3ConfigurationError UnsupportedSignatureVersionError UnknownSignatureVersionError EndpointVariantError "
    "UnknownFIPSEndpointError",
}
_BY_NAME = {name: advice for advice, names in _BY_FAILURE.items() for name in names.split()}


def error_code(error: Any) -> str:
    """Return the code of a server's error, or the HTTP status if the error has no code.

    Return `unknown` if there is neither, or if the code is not a plain word.
    """
    code = str(error.response.get("Error", {}).get("Code") or error_status(error) or "")
    return code if re.fullmatch(r"[A-Za-z0-9._-]{1,60}", code) else "unknown"


def error_status(error: Any) -> int:
    """Return the HTTP status of a server's error, or 0 if there is none."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def is_absent(error: Any) -> bool:
    """Return whether a server's error means that there is no such object. Servers use several codes for this."""
    code = error_code(error)
    return code in ("404", "NoSuchKey", "NotFound") or (error_status(error) == 404 and code not in _BY_CODE)


def is_taken(error: Any) -> bool:
    """Return whether a server's error means that an object to be created exists already, or is being written at the same time."""
    return error_status(error) in (409, 412) or error_code(error) in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
    )


def is_refused_feature(error: Any) -> bool:
    """Return whether a server's error may mean that the server does not support a feature of the request."""
    is_explained = error_code(error) in _BY_CODE and error_code(error) not in ("400", "405", "501")
    return error_status(error) in (400, 405, 411, 415, 417, 422, 501) and not is_explained


def describe_refusal(error: Any) -> str:
    """Return a phrase that says what a server's error means and what to do."""
    code, status = error_code(error), error_status(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders") or {}
    advice = (
        _REGION
        if "x-amz-bucket-region" in headers and 300 <= status < 400
        else _BY_CODE.get(code) or _BY_STATUS.get(status)
    )
    if advice is None:
        advice = _ELSEWHERE if 300 <= status < 400 else _LATER if status >= 500 and status != 501 else _NOT_S3
    return f"the server answered {code}: {advice}"


def describe_failure(error: Exception) -> str:
    """Return a phrase that says what a failure of boto3 itself means and what to do."""
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(cause, RecursionError):  # raised inside botocore while it was sending
        error = cause
    names = [kind.__name__ for kind in type(error).__mro__]
    if type(error).__name__ == "ParamValidationError" and "bucket" not in str(error).lower():
        return _LONG
    advice = next((_BY_NAME[name] for name in names if name in _BY_NAME), None)
    return advice or f"no answer from {server_name()} ({names[0]}); check the network and AWS_ENDPOINT_URL"


def server_name() -> str:
    """Return the host of the server that boto3 uses, without the other parts of its address."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return (re.split("[/?#]", redact(endpoint).partition("://")[2])[0] or "the server") if endpoint else "AWS"
