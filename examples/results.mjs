// Listens to every result, whoever sent the command: node results.mjs [queue]   (needs: npm install amqplib)
// Ends when the connection does: let a supervisor start it again. Meanwhile the results wait in the queue.
import amqp from 'amqplib';

const { AMQP_URL = 'amqp://guest:guest@127.0.0.1:5672/%2f', AMQP_PREFIX = 'call-manager' } = process.env;
// Yours: one per service, shared by its processes.
const queue = process.argv[2] ?? 'campaigns.call-results';

const connection = await amqp.connect(AMQP_URL);
const channel = await connection.createChannel();
connection.on('close', () => process.exit(1));
await channel.assertQueue(queue, { durable: true, arguments: { 'x-queue-type': 'quorum' } });
await channel.bindQueue(queue, `${AMQP_PREFIX}.results`, 'batch-calling.#');
await channel.prefetch(20);

// A result may come more than once, always with the same message_id. A real service keeps the ids in its database,
// written in the same transaction as what it makes of the result.
const handled = new Set();

await channel.consume(queue, (message) => {
  if (message === null) process.exit(1); // the queue was deleted
  const { messageId, correlationId, headers } = message.properties;
  if (!handled.has(messageId)) {
    const { success, data, error } = JSON.parse(message.content);
    console.log(message.fields.routingKey, correlationId, success ? data.id : `${headers.error_code}: ${error}`);
    handled.add(messageId);
  }
  channel.ack(message); // only now: had this process died above, the broker would deliver the result again
});
