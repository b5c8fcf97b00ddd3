//! Who may call what.

use std::os::unix::fs::PermissionsExt;

use hearth_proto::v1;
use rcgen::{CertificateParams, KeyPair, SanType};
use tonic::Code;
use tonic::transport::Identity;
use v1::agent_service_client::AgentServiceClient;
use v1::object_service_client::ObjectServiceClient;

use crate::agent::{FakeAgent, enroll};
use crate::cloud::{Cloud, User, config, reason, request};

#[tokio::test(flavor = "multi_thread")]
async fn only_valid_tokens_get_in_and_operators_alone_see_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    for folder in ["pki", "spool"] {
        assert_eq!(std::fs::metadata(dir.path().join(folder)).unwrap().permissions().mode() & 0o777, 0o700);
    }
    let path = dir.path().join("admin.json");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let channel = cloud.channel().await;
    let token = cloud.credentials.token.clone();
    let wrong = [
        None,
        Some(String::new()),
        Some("Bearer ".to_owned()),
        Some(token.clone()),
        Some(format!("Basic {token}")),
        Some(format!("Bearer {token}x")),
        Some(format!("Bearer {}", &token[..token.len() - 1])),
        Some(format!("Bearer hearth_{}", "A".repeat(43))),
        Some(format!("Bearer hearth_{}", "A".repeat(4000))),
    ];
    for authorization in wrong {
        let mut user = User::new(channel.clone(), authorization.clone());
        let error = user.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap_err();
        assert_eq!(
            (error.code(), reason(&error).as_str()),
            (Code::Unauthenticated, "AuthFailure"),
            "{authorization:?}"
        );
    }
    let mut admin = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let made = admin.accounts.create_account(create.clone()).await.unwrap().into_inner();
    assert_eq!(reason(&admin.accounts.create_account(create.clone()).await.unwrap_err()), "AccountAlreadyExists");
    let mut team = cloud.user_with(&made.token).await;
    let who = team.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap().into_inner();
    assert_eq!(who.account, made.account);
    for error in [
        team.hosts.list_hosts(v1::ListHostsRequest::default()).await.unwrap_err(),
        team.hosts.create_join_token(v1::CreateJoinTokenRequest::default()).await.unwrap_err(),
        team.accounts.create_account(create).await.unwrap_err(),
    ] {
        assert_eq!((error.code(), reason(&error).as_str()), (Code::PermissionDenied, "UnauthorizedOperation"));
    }
    // Secrets themselves are nowhere in the state folder.
    drop(team);
    let database = std::fs::read(dir.path().join("hearth.db")).unwrap();
    let log = std::fs::read(dir.path().join("hearth.db-wal")).unwrap_or_default();
    for secret in [&token, &made.token] {
        let found = |bytes: &[u8]| bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
        assert!(!found(&database) && !found(&log));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_do_not_see_each_other_but_use_the_operators_images() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (_agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let mut admin = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let token = admin.accounts.create_account(create).await.unwrap().into_inner().token;
    let mut team = cloud.user_with(&token).await;
    let shared = admin.import("debian").await;
    let private = team.import("debian").await;
    let id = admin.run(request(&shared, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    let own = team.run(request(&shared, "t3.nano")).await.unwrap().instances[0].instance_id.clone();
    assert_eq!(team.list().await.len(), 1);
    assert_eq!(reason(&team.terminate(&id).await.unwrap_err()), "InvalidInstanceID.NotFound");
    let both = v1::StopInstancesRequest { instance_ids: vec![own.clone(), id.clone()], force: false };
    let error = team.instances.stop_instances(both).await.unwrap_err();
    assert!(error.message().contains(&id) && !error.message().contains(&own), "{}", error.message());
    let error = admin.run(request(&private, "t3.nano")).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidAMIID.NotFound");
    let deregister = v1::DeregisterImageRequest { image_id: shared.image_id, ..Default::default() };
    assert_eq!(reason(&team.images.deregister_image(deregister).await.unwrap_err()), "UnauthorizedOperation");
}

#[tokio::test(flavor = "multi_thread")]
async fn join_tokens_work_once_and_only_for_their_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let token = cloud.join_token().await;
    let garbage = ["".to_owned(), "hearth-join-1.x.y".to_owned(), {
        let mut forged = token.clone();
        forged.secret[0] ^= 1;
        forged.reveal()
    }];
    for text in garbage {
        assert_eq!(enroll(&cloud, &text, "h").await.unwrap_err().code(), Code::Unauthenticated);
    }
    let mut elsewhere = token.clone();
    elsewhere.ca_sha256[0] ^= 1;
    assert!(enroll(&cloud, &elsewhere.reveal(), "h").await.unwrap_err().message().contains("another cluster"));
    // A bad request does not use the token up.
    let mut client = AgentServiceClient::new(cloud.channel().await);
    let bad = v1::EnrollRequest {
        token: token.reveal(),
        certificate_request: vec![1, 2, 3].into(),
        host_name: "host".into(),
    };
    assert_eq!(client.enroll(bad).await.unwrap_err().code(), Code::InvalidArgument);
    // Of many that try at once with one token, one gets in.
    let text = token.reveal();
    let tries = futures::future::join_all((0..8).map(|_| enroll(&cloud, &text, "host"))).await;
    assert_eq!(tries.iter().filter(|joined| joined.is_ok()).count(), 1);
    // A second host of the same name gets a name of its own.
    let (second, _) = enroll(&cloud, &cloud.join_token().await.reveal(), "host").await.unwrap();
    let mut user = cloud.user().await;
    assert_eq!(user.host(&second).await.name, "host-2");
    let error = user.hosts.create_join_token(v1::CreateJoinTokenRequest { ttl_seconds: 86401 }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_join_tokens_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user().await;
    let made = user.hosts.create_join_token(v1::CreateJoinTokenRequest { ttl_seconds: 1 }).await.unwrap().into_inner();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    assert_eq!(enroll(&cloud, &made.token, "h").await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_need_a_certificate_of_this_cluster_and_of_a_host_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let fetch = || v1::GetObjectRequest { key: "snap/none/root".into(), head: false, ..Default::default() };
    let mut without = ObjectServiceClient::new(cloud.channel().await);
    assert_eq!(without.get_object(fetch()).await.unwrap_err().code(), Code::Unauthenticated);
    // A user's token is no way into the agents' service either.
    let mut request = tonic::Request::new(fetch());
    let bearer = format!("Bearer {}", cloud.credentials.token).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    assert_eq!(without.get_object(request).await.unwrap_err().code(), Code::Unauthenticated);

    let agent = FakeAgent::join(&cloud, "host-a").await;
    // The right names, signed by somebody else.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    let uri = format!("spiffe://{}/agent/{}", "0".repeat(16), agent.host_id);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    let foreign = params.self_signed(&key).unwrap();
    let identity = Identity::from_pem(foreign.pem(), key.serialize_pem());
    let refused = match cloud.endpoint(cloud.tls().identity(identity)).connect().await {
        Err(_) => true,
        Ok(channel) => {
            ObjectServiceClient::new(channel).get_object(fetch()).await.is_err_and(|e| e.code() != Code::NotFound)
        }
    };
    assert!(refused, "a foreign certificate gets in");
    let mut good = agent.object_client(&cloud).await;
    assert_eq!(good.get_object(fetch()).await.unwrap_err().code(), Code::NotFound);

    // Its certificate does not make it another host.
    let mut liar = agent.clone();
    liar.hello.host_id = "h-00000000000000000".into();
    let error = liar.connect(&cloud).await.err().unwrap();
    assert_eq!(error.code(), Code::PermissionDenied);

    let session = agent.connect(&cloud).await.unwrap();
    let mut user = cloud.user().await;
    let remove = v1::RemoveHostRequest { host: "host-a".into(), force: false };
    user.hosts.remove_host(remove).await.unwrap();
    assert_eq!(session.ended().await.code(), Code::Unavailable);
    assert_eq!(good.get_object(fetch()).await.unwrap_err().code(), Code::PermissionDenied);
    let error = user.hosts.get_host(v1::GetHostRequest { host: "host-a".into() }).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidHostID.NotFound");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_survive_restarts_and_are_made_anew_when_lost() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let first = cloud.credentials.clone();
    cloud.stop().await.unwrap();
    let cloud = Cloud::start(dir.path()).await;
    assert_eq!((&cloud.credentials.token, &cloud.credentials.ca_certificate), (&first.token, &first.ca_certificate));
    cloud.stop().await.unwrap();
    std::fs::remove_file(dir.path().join("admin.json")).unwrap();
    let cloud = Cloud::start(dir.path()).await;
    assert_ne!(cloud.credentials.token, first.token);
    let mut user = cloud.user().await;
    user.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap();
    cloud.stop().await.unwrap();
    // Two clouds in one store would delete each other's snapshots.
    let other_dir = tempfile::tempdir().unwrap();
    let mut other = config(other_dir.path());
    other.object_store = Some(format!("file://{}", dir.path().join("objects").display()));
    let error = hearth_control::Control::start(other).await.err().unwrap().to_string();
    assert!(error.contains("another cluster"), "{error}");
    let mut away = config(other_dir.path());
    away.object_store = Some("s3://bucket/prefix".into());
    away.object_store_options.s3.endpoint = Some("https://127.0.0.1:1".into());
    away.object_store_options.retry_timeout = Some(std::time::Duration::from_millis(10));
    let error = hearth_control::Control::start(away).await.err().unwrap().to_string();
    assert!(error.contains("s3://bucket/prefix"), "{error}");
    let mut other = config(dir.path());
    other.region = "elsewhere-1".into();
    assert!(hearth_control::Control::start(other).await.err().unwrap().to_string().contains("region"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_made_listed_and_refused_as_soon_as_they_are_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let mut admin = cloud.user().await;
    let create = v1::CreateAccountRequest { name: "team".into(), is_operator: false };
    let made = admin.accounts.create_account(create).await.unwrap().into_inner();
    let account_id = made.account.unwrap().account_id;
    let mut team = cloud.user_with(&made.token).await;
    let list = async |user: &mut User, account: &str| {
        let request = v1::ListTokensRequest { account_id: account.into(), page: None };
        user.accounts.list_tokens(request).await.map(|answer| answer.into_inner().api_tokens)
    };
    let create = |account: &str| v1::CreateTokenRequest { description: "laptop".into(), account_id: account.into() };
    let revoke = |id: &str| v1::RevokeTokenRequest { token_id: id.into() };
    let first = list(&mut team, "").await.unwrap();
    assert_eq!((first.len(), first[0].is_callers, first[0].account_id.as_str()), (1, true, account_id.as_str()));

    let second = team.accounts.create_token(create("")).await.unwrap().into_inner();
    let info = second.api_token.unwrap();
    assert_eq!((info.description.as_str(), info.account_id.as_str(), info.is_callers), ("laptop", &*account_id, false));
    let mut laptop = cloud.user_with(&second.token).await;
    let who = laptop.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap().into_inner();
    assert_eq!(who.account.unwrap().account_id, account_id);
    let mut ids: Vec<String> = list(&mut laptop, "").await.unwrap().into_iter().map(|token| token.token_id).collect();
    ids.retain(|id| *id != first[0].token_id);
    assert_eq!(ids, std::slice::from_ref(&info.token_id));

    // From the answer on it is refused, on connections that are open too; the other token goes on.
    team.accounts.revoke_token(revoke(&info.token_id)).await.unwrap();
    let error = laptop.accounts.get_caller_identity(v1::GetCallerIdentityRequest {}).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Unauthenticated, "AuthFailure"));
    assert_eq!(
        reason(&team.accounts.revoke_token(revoke(&info.token_id)).await.unwrap_err()),
        "InvalidTokenID.NotFound"
    );
    assert_eq!(list(&mut team, "").await.unwrap(), first);

    // Other accounts' tokens are the operators' business alone.
    let admins = list(&mut admin, "").await.unwrap();
    assert!(admins[0].is_callers);
    let error = team.accounts.revoke_token(revoke(&admins[0].token_id)).await.unwrap_err();
    assert_eq!(reason(&error), "InvalidTokenID.NotFound");
    let error = team.accounts.create_token(create(&admins[0].account_id)).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert_eq!(list(&mut team, &admins[0].account_id).await.unwrap_err().code(), Code::PermissionDenied);
    let error = list(&mut admin, "999").await.unwrap_err();
    assert_eq!(reason(&error), "InvalidAccountID.NotFound");
    let third = admin.accounts.create_token(create(&account_id)).await.unwrap().into_inner();
    assert_eq!(list(&mut admin, &account_id).await.unwrap().len(), 2);
    admin.accounts.revoke_token(revoke(&first[0].token_id)).await.unwrap();
    assert_eq!(list(&mut team, "").await.unwrap_err().code(), Code::Unauthenticated);

    // All of it survives a restart, and no token stands in the store.
    cloud.stop().await.unwrap();
    let database = std::fs::read(dir.path().join("hearth.db")).unwrap();
    for secret in [&second.token, &third.token] {
        assert!(!database.windows(secret.len()).any(|part| part == secret.as_bytes()));
    }
    let cloud = Cloud::start(dir.path()).await;
    let mut user = cloud.user_with(&third.token).await;
    assert_eq!(list(&mut user, "").await.unwrap().len(), 1);
    for revoked in [&made.token, &second.token] {
        let mut user = cloud.user_with(revoked).await;
        assert_eq!(list(&mut user, "").await.unwrap_err().code(), Code::Unauthenticated);
    }
    for _ in 1..100 {
        user.accounts.create_token(create("")).await.unwrap();
    }
    let error = user.accounts.create_token(create("")).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::ResourceExhausted, "TokenLimitExceeded"));
}
