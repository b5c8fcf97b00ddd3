use super::*;
use tonic_types::ErrorDetails;

fn failure(code: Code, reason: &str, message: &str) -> CliError {
    let status = Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "hearth.v1", []));
    CliError::from(status)
}

#[test]
fn exit_codes_follow_what_went_wrong() {
    for (code, reason, exit) in [
        (Code::NotFound, "InvalidInstanceID.NotFound", 3),
        (Code::InvalidArgument, "InvalidKeyPair.NotFound", 3),
        (Code::InvalidArgument, "InvalidParameterValue", 2),
        (Code::FailedPrecondition, "IncorrectInstanceState", 4),
        (Code::ResourceExhausted, "InsufficientInstanceCapacity", 4),
        (Code::AlreadyExists, "InvalidAMIName.Duplicate", 4),
        (Code::DeadlineExceeded, "", 5),
        (Code::Unauthenticated, "AuthFailure", 1),
        (Code::Internal, "InternalError", 1),
    ] {
        assert_eq!(failure(code, reason, "text").exit_code(), exit, "{reason}");
    }
    assert_eq!(CliError::Timeout(String::new()).exit_code(), 5);
    assert_eq!(CliError::Usage(String::new()).exit_code(), 2);
    assert_eq!(CliError::Declined.exit_code(), 1);
}

#[test]
fn the_message_has_ec2s_code_and_a_way_on() {
    let text = failure(Code::NotFound, "InvalidInstanceID.NotFound", "instance i-0123 does not exist").text();
    let wanted = "error: instance i-0123 does not exist (InvalidInstanceID.NotFound)\n\
                  hint: `hearth instance list` shows yours.";
    assert_eq!(text, wanted);
    // Without details, gRPC's own words are all there is.
    let text = CliError::from(Status::new(Code::Unimplemented, "")).text();
    assert!(text.contains("Unimplemented"), "{text}");
}

#[test]
fn fields_are_told_unless_the_message_has_them() {
    let mut details = ErrorDetails::new();
    details.set_error_info("InvalidParameterValue", "hearth.v1", []);
    details.add_bad_request_violation("tags[0].key", "must not be empty");
    details.add_bad_request_violation("name", "is too long");
    let status = Status::with_error_details(Code::InvalidArgument, "name: is too long", details);
    let text = CliError::from(status).text();
    assert_eq!(text, "error: name: is too long (InvalidParameterValue)\n  tags[0].key: must not be empty");
}

#[test]
fn advice_fits_the_reason_of_a_failed_connection() {
    let advice = |reason: &str| CliError::unreachable("https://x:1", reason).text();
    assert!(advice("Connection refused (os error 111)").contains("hearthd up"));
    assert!(advice("invalid peer certificate: UnknownIssuer").contains("--ca"));
    assert!(advice("dns error: no record").contains("name is not known"));
    assert!(!CliError::unreachable("x", "invalid peer certificate: UnknownIssuer").is_transient());
    assert!(CliError::unreachable("x", "Connection refused").is_transient());
    assert!(failure(Code::Unavailable, "Unavailable", "starting").is_transient());
    assert!(!failure(Code::NotFound, "x", "").is_transient());
}

#[test]
fn a_refused_call_is_no_transport_failure() {
    // A status that came from the server has no source.
    assert!(matches!(failure(Code::Unavailable, "Unavailable", "starting"), CliError::Api(_)));
}
