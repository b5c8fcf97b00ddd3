//! `hearth host …`

use hearth_proto::v1::{
    ActivateHostRequest, CreateJoinTokenRequest, DrainHostRequest, GetHostRequest, Host, ListHostsRequest, PageRequest,
    RemoveHostRequest,
};
use hearth_types::HostId;
use serde_json::json;

use super::Context;
use super::confirm::confirm;
use crate::args::{HostCommand, OutputForm};
use crate::client::{all_pages, filters};
use crate::error::CliError;
use crate::output;

pub async fn run(context: &Context, command: HostCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        HostCommand::List { hosts, list } => {
            let (host_ids, names): (Vec<_>, Vec<_>) =
                hosts.into_iter().partition(|host| host.parse::<HostId>().is_ok());
            let wanted = filters(list.filters.iter().chain(&list.tags));
            let one_page = async |page: PageRequest| {
                let request =
                    ListHostsRequest { host_ids: host_ids.clone(), filters: wanted.clone(), page: Some(page) };
                let answer = client.unwrap(client.hosts().list_hosts(request).await)?;
                Ok((answer.hosts, answer.page))
            };
            let mut found: Vec<Host> =
                if host_ids.is_empty() && !names.is_empty() { Vec::new() } else { all_pages(one_page).await? };
            for host in names {
                found.push(client.unwrap(client.hosts().get_host(GetHostRequest { host }).await)?);
            }
            found.sort_by(|a, b| a.name.cmp(&b.name));
            output::print_list(&found, context.output)
        }
        HostCommand::Describe { host } => {
            let found = client.unwrap(client.hosts().get_host(GetHostRequest { host }).await)?;
            output::print_one(&found, context.output)
        }
        HostCommand::Drain { host } => {
            let changed = client.unwrap(client.hosts().drain_host(DrainHostRequest { host }).await)?;
            output::print_list(&[changed], context.output)
        }
        HostCommand::Activate { host } => {
            let changed = client.unwrap(client.hosts().activate_host(ActivateHostRequest { host }).await)?;
            output::print_list(&[changed], context.output)
        }
        HostCommand::Remove { host, force, yes } => {
            let found = client.unwrap(client.hosts().get_host(GetHostRequest { host: host.clone() }).await)?;
            let lost = match (force, found.instance_count) {
                (true, count) if count > 0 => format!(" Its {count} instances become terminated."),
                _ => String::new(),
            };
            confirm(&format!("Forget host {} ({})?{lost}", found.name, found.host_id), yes)?;
            client.unwrap(client.hosts().remove_host(RemoveHostRequest { host, force }).await)?;
            if context.for_people() {
                output::print(&format!("{} is removed\n", found.host_id))
            } else {
                output::print(&format!("{}\n", found.host_id))
            }
        }
        HostCommand::Token { ttl } => {
            let ttl_seconds = u32::try_from(ttl.as_secs())
                .ok()
                .filter(|seconds| (1..=86_400).contains(seconds))
                .ok_or_else(|| CliError::Usage("--ttl must be between 1s and 24h".to_owned()))?;
            let request = CreateJoinTokenRequest { ttl_seconds };
            let made = client.unwrap(client.hosts().create_join_token(request).await)?;
            match context.output {
                OutputForm::Table | OutputForm::Wide => {
                    output::print(&format!("{}\n", made.token))?;
                    eprintln!("\nvalid once until {}; on the new host:", made.expires_at);
                    eprintln!("  HEARTH_JOIN_TOKEN=… hearthd agent --control https://THIS-HOST:7443");
                    Ok(())
                }
                OutputForm::Id => output::print(&format!("{}\n", made.token)),
                form => {
                    let value = json!({"token": made.token, "expires_at": made.expires_at});
                    output::print(&output::render_value(&value, form)?)
                }
            }
        }
    }
}
