//! The catalogue of instance types.

use hearth_proto::v1;
use hearth_types::InstanceType;
use tonic::{Code, Request, Response, Status};

use super::Api;
use crate::api_error::{ApiError, ApiResult};
use crate::auth;
use crate::check;
use crate::core::Core;
use crate::paging::Pager;

const FILTERS: [&str; 4] =
    ["instance-type", "vcpu-info.default-vcpus", "memory-info.size-in-mib", "instance-storage-supported"];

pub(crate) fn resources(kind: &InstanceType) -> v1::Resources {
    let resources = kind.resources();
    v1::Resources {
        vcpus: resources.vcpus,
        memory_mib: resources.memory_mib,
        ecu_milli: resources.ecu_milli,
        instance_store_bytes: resources.instance_store_bytes,
    }
}

/// The type with this name.
pub(crate) fn find(core: &Core, name: &str) -> ApiResult<InstanceType> {
    core.catalogue.get(name).cloned().ok_or_else(|| {
        let message = format!("instance_type: there is no type '{name:.40}'; see `hearth instance-type list`");
        ApiError::new(Code::InvalidArgument, "InvalidInstanceType", message).with("parameter", "instance_type")
    })
}

fn view(kind: &InstanceType) -> v1::InstanceTypeInfo {
    v1::InstanceTypeInfo {
        name: kind.name.clone(),
        resources: Some(resources(kind)),
        burstable_quota: kind.ecu_milli.is_some(),
        instance_store_gib: kind.instance_store_gib.clone(),
        network_mbps: kind.network_mbps,
        ebs_mbps: kind.ebs_mbps,
        max_network_interfaces: kind.max_network_interfaces,
    }
}

#[tonic::async_trait]
impl v1::instance_type_service_server::InstanceTypeService for Api {
    async fn list_instance_types(
        &self,
        request: Request<v1::ListInstanceTypesRequest>,
    ) -> Result<Response<v1::ListInstanceTypesResponse>, Status> {
        let caller = auth::caller(&request)?;
        let mut request = request.into_inner();
        let page = request.page.take();
        let pager = Pager::new(&self.core, "ListInstanceTypes", &caller.account_id, &request, page.as_ref())?;
        let names = check::optional_ids("names", &request.names)?;
        let filters = check::filters(&request.filters, &FILTERS)?;
        let catalogue = &self.core.catalogue;
        let missing: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| catalogue.get(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(ApiError::not_found("InvalidInstanceType", "instance type", &missing).into());
        }
        let found: Vec<&InstanceType> = catalogue
            .iter()
            .filter(|kind| {
                pager.wants(&kind.name)
                    && (names.is_empty() || names.contains(&kind.name))
                    && filters.matches(|name| {
                        vec![match name {
                            "instance-type" => kind.name.as_str().into(),
                            "vcpu-info.default-vcpus" => kind.vcpus.to_string().into(),
                            "memory-info.size-in-mib" => kind.memory_mib.to_string().into(),
                            _ => std::borrow::Cow::from((!kind.instance_store_gib.is_empty()).to_string()),
                        }]
                    })
            })
            .collect();
        let (instance_types, page) = pager.collect(found.into_iter().map(|kind| (kind.name.as_str(), view(kind))));
        Ok(Response::new(v1::ListInstanceTypesResponse { instance_types, page }))
    }
}
