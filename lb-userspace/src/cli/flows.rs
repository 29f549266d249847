//! `show flows`: portion by portion, so that a million of them need no memory.

use std::io::{self, Write};

use super::{
    Ended,
    args::{FlowFilter, Format},
    read, text,
};
use crate::{
    admin::{
        client::Client,
        query::{FlowQuery, PAGE},
        view::FlowView,
    },
    failure::{Exit, Failure, OrExit as _},
};

/// `show flows [NAME] [filters]`; what is returned comes after what was written.
pub(super) fn show(
    client: &Client,
    name: Option<String>,
    filter: FlowFilter,
    format: Format,
    out: &mut dyn Write,
) -> Result<String, Failure> {
    let mut query = FlowQuery {
        virtual_server: filter.virtual_server.or(name),
        member: filter.member,
        client: filter.client,
        phase: filter.phase,
        limit: None,
        after: 0,
    };
    if filter.count {
        let count = client.count_flows(&query)?;
        return read::render(format, &count, |count| format!("{}\n", count.count));
    }
    let mut left = filter.limit.unwrap_or(u64::MAX);
    let mut list = List::new(format);
    while left > 0 {
        query.limit = Some(left.min(u64::from(PAGE)) as u32);
        let page = client.flows(&query)?;
        left = left.saturating_sub(page.flows.len() as u64);
        match list.portion(&page.flows, out) {
            // Who read has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(String::new()),
            written => written.or_exit(Exit::Failed)?,
        }
        match page.next {
            Some(next) => query.after = next,
            None => break,
        }
    }
    Ok(list.end())
}

/// The filters are for flows alone.
pub(super) fn only_of_flows() -> Ended {
    Ended {
        code: Exit::Usage.code(),
        err: "smtplb: --virtual-server, --member, --client, --phase, --limit and --count choose flows: \
              smtplb show flows …\n"
            .to_owned(),
        ..Ended::default()
    }
}

/// A list being written: the same text or JSON as in one piece.
struct List {
    json: bool,
    any: bool,
}

impl List {
    const fn new(format: Format) -> Self {
        Self {
            json: format.json,
            any: false,
        }
    }

    fn portion(&mut self, flows: &[FlowView], out: &mut dyn Write) -> io::Result<()> {
        if flows.is_empty() {
            return Ok(());
        }
        let first = !std::mem::replace(&mut self.any, true);
        if !self.json {
            let table = text::flows(flows);
            let skip = if first {
                0
            } else {
                table.find('\n').map_or(0, |end| end + 1)
            };
            return out.write_all(&table.as_bytes()[skip..]);
        }
        let mut begin = if first { "[\n" } else { ",\n" };
        for flow in flows {
            let object = serde_json::to_string_pretty(flow)?;
            write!(out, "{begin}  {}", object.replace('\n', "\n  "))?;
            begin = ",\n";
        }
        Ok(())
    }

    fn end(&self) -> String {
        match (self.json, self.any) {
            (true, true) => "\n]\n".to_owned(),
            (true, false) => "[]\n".to_owned(),
            (false, true) => String::new(),
            (false, false) => text::flows(&[]),
        }
    }
}
