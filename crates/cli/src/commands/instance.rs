//! `hearth instance …` and `hearth instance-type …`

use std::io::Write;

use hearth_proto::v1::{
    CreateReplaceRootVolumeTaskRequest, DeleteOnTermination, Filter, GetConsoleOutputRequest, GetImageRequest,
    GetInstanceRequest, Instance, InstanceState, InstanceStateChange, InstanceTypeInfo, ListInstanceTypesRequest,
    ModifyInstanceAttributeRequest, PageRequest, Placement, PlacementStrategy, RebootInstancesRequest,
    ReplaceRootVolumeTask, RunInstancesRequest, StartInstancesRequest, StopInstancesRequest, TerminateInstancesRequest,
};
use serde_json::{Value, json};

use super::confirm::confirm;
use super::{Context, console, lookup, mapping, read_input};
use crate::args::instance::{GuestShutdown, ModifyArgs, RunArgs, Switch, WaitFor};
use crate::args::mapping::DeviceSwitch;
use crate::args::{InstanceCommand, InstanceTypeCommand, OutputForm, WaitFlags};
use crate::client::{all_pages, client_token, filters, named_tags};
use crate::error::CliError;
use crate::output::{self, View};
use crate::view::instance::{name, state_name};
use crate::wait::{self, instance::Goal, task::Done};

/// EC2's limit for user data.
const MAX_USER_DATA: usize = 16 << 10;

pub async fn run(context: &Context, command: InstanceCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        InstanceCommand::Run(args) => launch(context, *args).await,
        InstanceCommand::List { instances, all, list } => {
            let ids = lookup::instances(client, &instances).await?;
            let mut wanted = filters(list.filters.iter().chain(&list.tags));
            let says_state = wanted.iter().any(|filter| filter.name.starts_with("instance-state"));
            if ids.is_empty() && !all && !says_state && context.for_people() {
                wanted.push(alive_filter());
            }
            let mut found = lookup::list_instances(client, &ids, &wanted).await?;
            found.sort_by(|a, b| (&a.launch_time, a.ami_launch_index).cmp(&(&b.launch_time, b.ami_launch_index)));
            output::print_list(&found, context.output)
        }
        InstanceCommand::Describe { instance } => {
            let instance_id = lookup::instance(client, &instance).await?;
            let found = client.unwrap(client.instances().get_instance(GetInstanceRequest { instance_id }).await)?;
            output::print_one(&found, context.output)
        }
        InstanceCommand::Start { instances, wait } => {
            let instance_ids = lookup::instances(client, &instances).await?;
            let request = StartInstancesRequest { instance_ids };
            let changes = client.unwrap(client.instances().start_instances(request).await)?.changes;
            changed(context, changes, Goal::State(InstanceState::Running), wait).await
        }
        InstanceCommand::Stop { instances, force, wait } => {
            let instance_ids = lookup::instances(client, &instances).await?;
            let request = StopInstancesRequest { instance_ids, force };
            let changes = client.unwrap(client.instances().stop_instances(request).await)?.changes;
            changed(context, changes, Goal::State(InstanceState::Stopped), wait).await
        }
        InstanceCommand::Reboot { instances } => {
            let instance_ids = lookup::instances(client, &instances).await?;
            let request = RebootInstancesRequest { instance_ids: instance_ids.clone() };
            client.unwrap(client.instances().reboot_instances(request).await)?;
            output::print_done(&instance_ids, "instance_id", "is rebooting", context.output)
        }
        InstanceCommand::Terminate { instances, yes, wait } => {
            let instance_ids = lookup::instances(client, &instances).await?;
            confirm(&format!("Terminate {} and delete the disks?", described(context, &instance_ids).await?), yes)?;
            let request = TerminateInstancesRequest { instance_ids };
            let changes = client.unwrap(client.instances().terminate_instances(request).await)?.changes;
            changed(context, changes, Goal::State(InstanceState::Terminated), wait).await
        }
        InstanceCommand::ReplaceRoot { instance, snapshot, image, delete_replaced, client_token: token, wait } => {
            let mut request = CreateReplaceRootVolumeTaskRequest {
                instance_id: lookup::instance(client, &instance).await?,
                delete_replaced_root_volume: delete_replaced,
                client_token: client_token(token)?,
                ..CreateReplaceRootVolumeTaskRequest::default()
            };
            if let Some(snapshot) = &snapshot {
                request.snapshot_id = lookup::snapshot(client, snapshot).await?;
            }
            if let Some(image) = &image {
                request.image_id = lookup::image(client, image).await?;
            }
            let mut task = client.unwrap(client.instances().create_replace_root_volume_task(request).await)?;
            let mut waited = Ok(());
            if wait.wait {
                let ids = [task.task_id.clone()];
                waited = wait::until::<ReplaceRootVolumeTask>(client, &ids, Done, wait.timeout).await;
                let last = lookup::list_replacements(client, &ids).await.unwrap_or_default();
                task = last.into_iter().next().unwrap_or(task);
            }
            output::print_list(&[task], context.output)?;
            waited
        }
        InstanceCommand::ReplaceRootTasks { tasks } => {
            let mut found = lookup::list_replacements(client, &tasks).await?;
            found.sort_by(|a, b| (&a.start_time, &a.task_id).cmp(&(&b.start_time, &b.task_id)));
            output::print_list(&found, context.output)
        }
        InstanceCommand::Modify(args) => modify(context, args).await,
        InstanceCommand::Console(args) => {
            let id = lookup::instance(client, &args.instance).await?;
            console::run(client, &id, &args).await
        }
        InstanceCommand::ConsoleOutput { instance } => {
            let instance_id = lookup::instance(client, &instance).await?;
            let request = GetConsoleOutputRequest { instance_id: instance_id.clone() };
            let answer = client.unwrap(client.instances().get_console_output(request).await)?;
            match context.output {
                OutputForm::Json | OutputForm::Yaml => {
                    let value = json!({
                        "instance_id": instance_id,
                        "timestamp": answer.timestamp,
                        "output": String::from_utf8_lossy(&answer.output),
                    });
                    output::print(&output::render_value(&value, context.output)?)
                }
                _ => std::io::stdout().write_all(&answer.output).map_err(CliError::io("write the output")),
            }
        }
    }
}

/// Terminated instances are only shown when asked for.
fn alive_filter() -> Filter {
    let alive = ["pending", "running", "shutting-down", "stopping", "stopped"];
    Filter { name: "instance-state-name".to_owned(), values: alive.map(str::to_owned).to_vec() }
}

/// "web (i-…), i-…": what is about to be lost.
async fn described(context: &Context, ids: &[String]) -> Result<String, CliError> {
    let found = lookup::list_instances(&context.client, ids, &[]).await?;
    let one = |instance: &Instance| match name(instance) {
        "" => instance.instance_id.clone(),
        name => format!("{name} ({})", instance.instance_id),
    };
    Ok(found.iter().map(one).collect::<Vec<_>>().join(", "))
}

async fn launch(context: &Context, args: RunArgs) -> Result<(), CliError> {
    let client = &context.client;
    if args.min_count.is_some_and(|min| min > args.count) {
        return Err(CliError::Usage("--min-count is larger than --count".to_owned()));
    }
    let user_data = match &args.user_data {
        Some(path) => read_input(path, MAX_USER_DATA, "user data")?,
        None => Vec::new(),
    };
    let client_token = client_token(args.client_token)?;
    let tags = named_tags(args.name.as_deref(), &args.tags);
    let image_id = lookup::image(client, &args.image).await?;
    let mut block_device_mappings = mapping::to_proto(client, &args.block_devices).await?;
    if let Some(size) = args.root_size {
        let request = GetImageRequest { image_id: image_id.clone() };
        let image = client.unwrap(client.images().get_image(request).await)?;
        mapping::set_root_size(&mut block_device_mappings, &image.root_device_name, size)?;
    }
    let placement = Placement {
        availability_zone: args.zone.unwrap_or_default(),
        host_id: args.host.unwrap_or_default(),
        strategy: if args.spread { PlacementStrategy::Spread } else { PlacementStrategy::Unspecified }.into(),
        spread_group: args.spread_group.unwrap_or_default(),
    };
    let request = RunInstancesRequest {
        image_id,
        instance_type: args.instance_type,
        min_count: args.min_count.unwrap_or(args.count),
        max_count: args.count,
        key_name: args.key_name.unwrap_or_default(),
        user_data: user_data.into(),
        client_token,
        tags,
        volume_tags: crate::client::tags(&args.volume_tags),
        placement: Some(placement),
        network_interface_count: args.network_interfaces,
        block_device_mappings,
        instance_initiated_shutdown_behavior: args.on_guest_shutdown.map(behavior).unwrap_or_default(),
        disable_api_termination: args.protect,
        dry_run: args.dry_run,
    };
    let answer = match client.unwrap(client.instances().run_instances(request).await) {
        Err(error) if args.dry_run && error.is_passed_dry_run() => {
            return output::print("nothing was launched: this was a dry run, and it would have worked\n");
        }
        answer => answer?,
    };
    let ids: Vec<String> = answer.instances.iter().map(|instance| instance.instance_id.clone()).collect();
    let mut instances = answer.instances;
    if let Some(goal) = args.wait {
        let goal = match goal {
            WaitFor::Running => Goal::State(InstanceState::Running),
            WaitFor::Ok => Goal::StatusOk,
        };
        // A script that gave up waiting needs the ids all the more.
        let waited = wait::until::<Instance>(client, &ids, goal, args.timeout).await;
        instances = lookup::list_instances(client, &ids, &[]).await.unwrap_or(instances);
        output::print_list(&instances, context.output)?;
        waited?;
    } else {
        output::print_list(&instances, context.output)?;
    }
    if let ([first, ..], true) = (instances.as_slice(), context.for_people()) {
        let named = if instances.len() == 1 && !name(first).is_empty() { name(first) } else { &first.instance_id };
        eprintln!("\nconsole: hearth instance console {named}");
    }
    Ok(())
}

/// EC2's word for it.
fn behavior(action: GuestShutdown) -> String {
    match action {
        GuestShutdown::Stop => "stop",
        GuestShutdown::Terminate => "terminate",
    }
    .to_owned()
}

fn delete_on_termination(switch: DeviceSwitch) -> DeleteOnTermination {
    DeleteOnTermination { device_name: switch.device, delete_on_termination: switch.on }
}

async fn modify(context: &Context, args: ModifyArgs) -> Result<(), CliError> {
    let client = &context.client;
    let attributes = args.attributes;
    let read = |path| read_input(path, MAX_USER_DATA, "user data");
    let user_data = attributes.user_data.as_deref().map(read).transpose()?;
    let request = ModifyInstanceAttributeRequest {
        instance_id: lookup::instance(client, &args.instance).await?,
        disable_api_termination: attributes.termination_protection.map(|switch| switch == Switch::On),
        instance_initiated_shutdown_behavior: attributes.shutdown_behavior.map(behavior),
        instance_type: attributes.instance_type,
        user_data: user_data.map(Into::into),
        delete_on_termination: attributes.delete_on_termination.into_iter().map(delete_on_termination).collect(),
    };
    let changed = client.unwrap(client.instances().modify_instance_attribute(request).await)?;
    output::print_one(&changed, context.output)
}

/// A state change as a row.
struct Change(InstanceStateChange);

impl View for Change {
    const COLUMNS: &'static [&'static str] = &["INSTANCE", "BEFORE", "NOW"];
    const NARROW: usize = 3;

    fn cells(&self) -> Vec<String> {
        vec![self.id(), state_name(self.0.previous_state()), state_name(self.0.current_state())]
    }

    fn value(&self) -> Value {
        json!({
            "instance_id": self.0.instance_id,
            "previous_state": state_name(self.0.previous_state()),
            "current_state": state_name(self.0.current_state()),
        })
    }

    fn id(&self) -> String {
        self.0.instance_id.clone()
    }
}

async fn changed(
    context: &Context,
    changes: Vec<InstanceStateChange>,
    goal: Goal,
    flags: WaitFlags,
) -> Result<(), CliError> {
    let mut changes: Vec<_> = changes.into_iter().map(Change).collect();
    if flags.wait {
        let ids: Vec<String> = changes.iter().map(View::id).collect();
        wait::until::<Instance>(&context.client, &ids, goal, flags.timeout).await?;
        if let Goal::State(state) = goal {
            changes.iter_mut().for_each(|change| change.0.set_current_state(state));
        }
    }
    output::print_list(&changes, context.output)
}

pub async fn types(context: &Context, command: InstanceTypeCommand) -> Result<(), CliError> {
    let InstanceTypeCommand::List { names, filters: given } = command;
    let client = &context.client;
    let one_page = async |page: PageRequest| {
        let request = ListInstanceTypesRequest { names: names.clone(), filters: filters(&given), page: Some(page) };
        let answer = client.unwrap(client.instance_types().list_instance_types(request).await)?;
        Ok((answer.instance_types, answer.page))
    };
    let mut found: Vec<InstanceTypeInfo> = all_pages(one_page).await?;
    let size = |t: &InstanceTypeInfo| t.resources.map(|r| (r.vcpus, r.memory_mib));
    found.sort_by(|a, b| {
        let family = |t: &InstanceTypeInfo| t.name.split('.').next().unwrap_or_default().to_owned();
        (family(a), size(a), &a.name).cmp(&(family(b), size(b), &b.name))
    });
    output::print_list(&found, context.output)
}
