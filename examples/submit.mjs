// Submits one batch of calls and prints its id: node submit.mjs [body.json [message_id]]   (needs: npm install amqplib)
// Exit code 0: the batch exists. 1: the submit failed. 2: could not ask, or no result came in time.
import { randomUUID } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import amqp from 'amqplib';

const { AMQP_URL = 'amqp://guest:guest@127.0.0.1:5672/%2f', AMQP_PREFIX = 'call-manager' } = process.env;
const WAIT_MS = 120_000;
const EXAMPLE = JSON.stringify({
  call_name: 'Recordatorio de citas',
  agent_id: 'agent_8101kf2vq3e5bn7c9r4t6y1m0x2z',
  agent_phone_number_id: 'phnum_3301kf2vq3e5bn7c9r4t6y1m0x2z',
  recipients: [
    { phone_number: '+1234567890', dynamic_variables: { nombre: 'Ana', cita: 'lunes a las 9' } },
    { phone_number: '+0987654321', dynamic_variables: { nombre: 'Luis', cita: 'lunes a las 10' } },
  ],
  scheduled_time_unix: null, // null: now
  phone_provider: 'twilio',
});

async function submit(body, messageId) {
  const connection = await amqp.connect(AMQP_URL);
  connection.on('error', () => {}); // 'close' follows, and fails what is awaited below
  const channel = await connection.createConfirmChannel();
  const { queue } = await channel.assertQueue('', { exclusive: true });
  const result = new Promise((resolve, reject) => {
    connection.on('close', () => reject(new Error('the broker closed the connection')));
    channel.on('error', reject);
    channel.on('return', () => reject(new Error('no queue takes submits: has the worker run yet?')));
    channel.consume(queue, resolve, { noAck: true }).catch(reject);
    setTimeout(reject, WAIT_MS, new Error('no result yet')).unref();
  });
  const properties = { messageId, correlationId: messageId, replyTo: queue, contentType: 'application/json' };
  const safely = { persistent: true, mandatory: true };
  channel.publish(`${AMQP_PREFIX}.commands`, 'batch-calling.submit', body, { ...properties, ...safely });
  const [reply] = await Promise.all([result, channel.waitForConfirms()]);
  await connection.close();
  const { success, data, error } = JSON.parse(reply.content);
  console.log(success ? data.id : `${reply.properties.headers.error_code}: ${error}`);
  return success ? 0 : 1;
}

// One id per command, made once and stored with it. In doubt (no confirm, no result), publish the same body again with
// the same id: that never makes a second batch. A new id is a new campaign.
const [file, messageId = randomUUID()] = process.argv.slice(2);
try {
  process.exitCode = await submit(file ? await readFile(file) : Buffer.from(EXAMPLE), messageId);
} catch (error) {
  console.error(`${error.message || error.code}\nTo ask again, publish the same body with message_id ${messageId}`);
  process.exit(2);
}
