//! `hearth tag …`

use hearth_proto::v1::{
    CreateTagsRequest, DeleteTagsRequest, ListTagsRequest, PageRequest, TagToDelete, TaggedResource,
};

use super::Context;
use crate::args::TagCommand;
use crate::client::{all_pages, filters, tags};
use crate::error::CliError;
use crate::output;

pub async fn run(context: &Context, command: TagCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        TagCommand::Create { resources, tags: given } => {
            let request = CreateTagsRequest { resource_ids: resources, tags: tags(&given) };
            client.unwrap(client.tags().create_tags(request).await)?;
            Ok(())
        }
        TagCommand::Delete { resources, tags: given } => {
            let tags = given.into_iter().map(|tag| TagToDelete { key: tag.key, value: tag.value }).collect();
            let request = DeleteTagsRequest { resource_ids: resources, tags };
            client.unwrap(client.tags().delete_tags(request).await)?;
            Ok(())
        }
        TagCommand::List { filters: given } => {
            let one_page = async |page: PageRequest| {
                let request = ListTagsRequest { filters: filters(&given), page: Some(page) };
                let answer = client.unwrap(client.tags().list_tags(request).await)?;
                Ok((answer.tags, answer.page))
            };
            let found: Vec<TaggedResource> = all_pages(one_page).await?;
            output::print_list(&found, context.output)
        }
    }
}
