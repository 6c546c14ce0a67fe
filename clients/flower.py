"""The ClientApp: Flower's door to ``Silo``. The training is that of every other pool."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.attempt import OpenRuntime, open_runtime
from clients.records import Parcel, parcel_of
from clients.silo import Silo, SiloSettings, read_settings
from fedlora.errors import FedLoRAError


def make_app(open_runtime: OpenRuntime = open_runtime) -> ClientApp:
    """A ClientApp that keeps its base model loaded from one message to the next, where its process lives on."""
    app = ClientApp()
    kept: list[Silo] = []

    def silo(context: Context) -> Silo:
        settings: SiloSettings = read_settings(context.node_config)
        if not kept or kept[0].settings != settings:
            kept[:] = [Silo(settings, open_runtime)]
        return kept[0]

    def answer(what: str, message: Message, context: Context) -> Message:
        try:
            parcel: Parcel = getattr(silo(context), what)(parcel_of(message.content))
        except FedLoRAError as error:
            parcel = Parcel({"error": str(error)})
        return Message(parcel.to_records(), reply_to=message)

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        return answer("describe", message, context)

    @app.query("exchange")
    def exchange(message: Message, context: Context) -> Message:
        return answer("exchange", message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer("train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer("evaluate", message, context)

    return app


app = make_app()
