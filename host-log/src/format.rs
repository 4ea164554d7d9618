//! What a line looks like: text for people, or JSON, each with time, level and who says it.

use std::fmt;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::{LogFormat, SERVICE};

/// Who says it, as names and values.
pub type Who = Vec<(&'static str, String)>;

/// Formats events as lines of the service, or as plain text while this process is only a command.
pub struct EventLine;

impl<S, N> FormatEvent<S, N> for EventLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(service) = SERVICE.get() else {
            return context.field_format().format_fields(writer, event);
        };
        let meta = event.metadata();
        match service.format {
            LogFormat::Json => {
                let mut fields = Fields(Map::new());
                event.record(&mut fields);
                write!(writer, "{}", json(meta.level(), &service.who, meta.target(), fields.0))
            }
            LogFormat::Text => {
                head(&mut writer, meta.level(), &service.who)?;
                context.field_format().format_fields(writer, event)
            }
        }
    }
}

/// A line that does not come from an event.
pub fn line(format: LogFormat, who: &Who, message: &str) -> String {
    match format {
        LogFormat::Json => {
            let fields = Map::from_iter([("message".to_owned(), Value::from(message))]);
            json(&Level::WARN, who, env!("CARGO_CRATE_NAME"), fields)
        }
        LogFormat::Text => {
            let mut text = String::new();
            // Writing to a string does not fail.
            head(&mut Writer::new(&mut text), &Level::WARN, who).unwrap_or_else(|e| unreachable!("{e}"));
            text + message
        }
    }
}

/// Of text that may be a stranger's, what could look like another line is replaced.
pub fn one_line(text: &str) -> String {
    text.trim_end().replace('\n', " | ").replace(char::is_control, "\u{fffd}")
}

fn head(writer: &mut Writer<'_>, level: &Level, who: &Who) -> fmt::Result {
    SystemTime.format_time(writer)?;
    write!(writer, " {level:>5}")?;
    for (name, value) in who {
        write!(writer, " {name}={value}")?;
    }
    write!(writer, ": ")
}

fn json(level: &Level, who: &Who, target: &str, mut fields: Map<String, Value>) -> String {
    let mut time = String::new();
    // Without a clock there is a line without a time.
    SystemTime.format_time(&mut Writer::new(&mut time)).unwrap_or_default();
    fields.insert("time".into(), time.into());
    fields.insert("level".into(), level.as_str().into());
    fields.insert("target".into(), target.into());
    fields.extend(who.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into())));
    Value::from(fields).to_string()
}

/// The fields of an event, its message among them.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }
}
