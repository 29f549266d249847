//! Certificates in use, for those who ask.

use std::time::SystemTime;

use jiff::Timestamp;

use super::{live::names_of, running::Running};
use crate::admin::view::CertificateView;

/// Every certificate that a virtual server uses, in the order of their names.
pub(super) fn views(running: &Running) -> Vec<CertificateView> {
    let now = SystemTime::now();
    let generation = &running.generation;
    let mut views: Vec<_> = running
        .certificates
        .all()
        .map(|loaded| {
            let users = generation.virtual_servers.iter();
            let users = users.filter(|server| names_of(server).contains(&&loaded.name));
            let configured = generation.certificates.get(&loaded.name);
            // The past counts down from -1, so that 0 is today.
            let days_left = match loaded.not_after.duration_since(now) {
                Ok(left) => (left.as_secs() / 86_400).cast_signed(),
                Err(over) => -1 - (over.duration().as_secs() / 86_400).cast_signed(),
            };
            CertificateView {
                name: loaded.name.to_string(),
                host_names: loaded.host_names.clone(),
                key: loaded.key_kind.clone(),
                pin: loaded.pin.map_or_else(String::new, |pin| pin.to_string()),
                not_after: Timestamp::try_from(loaded.not_after)
                    .map_or_else(|_| "-".to_owned(), |end| end.to_string()),
                days_left,
                chain: configured.map_or_else(String::new, |it| it.chain.display().to_string()),
                used_by: users.map(|server| server.name.to_string()).collect(),
                warnings: loaded.warnings.clone(),
            }
        })
        .collect();
    views.sort_by(|a, b| a.name.cmp(&b.name));
    views
}
