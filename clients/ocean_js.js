'use strict'
// ocean.js as it is, against a running service: node ocean_js.js encrypt|jobs <file>
// The file holds what it works on, as JSON; tests/test_clients.py writes it. Every step prints one line of JSON.

const fs = require('node:fs')

// The library logs by console.log; standard output is for the steps.
console.log = console.error

const { ethers } = require('ethers')
const { approveWei, Datatoken, downloadFile, ProviderInstance } = require('@oceanprotocol/lib')

const [, , what, path] = process.argv
const given = JSON.parse(fs.readFileSync(path, 'utf8'))
const url = given.provider
const rpc = new ethers.providers.StaticJsonRpcProvider(given.rpc)
rpc.pollingInterval = 100
const signer = new ethers.Wallet(given.key, rpc)
const datatoken = new Datatoken(signer, given.chainId)

function told(step, facts) {
  fs.writeSync(1, JSON.stringify({ step, ...facts }) + '\n')
}

async function encrypt() {
  for (const [name, asset] of Object.entries(given.encrypt)) {
    told('encrypt', { name, files: await ProviderInstance.encrypt(asset, given.chainId, url) })
  }
}

async function look() {
  const address = signer.address
  told('discovery', { valid: await ProviderInstance.isValidProvider(url), ...(await ProviderInstance.getEndpoints(url)) })
  told('nonce', { nonce: await ProviderInstance.getNonce(url, address) })
  const environments = (await ProviderInstance.getComputeEnvironments(url))[given.chainId]
  told('environments', { environments })
  const { did, serviceId } = given.dataset
  told('fileinfo', {
    asset: await ProviderInstance.checkDidFiles(did, serviceId, url, true),
    file: await ProviderInstance.getFileInfo({ type: 'url', url: given.file, method: 'GET' }, url, true)
  })
  const { did: algorithm, serviceId: access } = given.algorithm
  told('initialize', await ProviderInstance.initialize(algorithm, access, 0, address, url))
  return environments.find((environment) => environment.priceMin > 0)
}

// What initializeCompute asks for: an order, the reuse of one, or nothing.
async function order(asset, cost, environment) {
  if (cost.validOrder && !cost.providerFee) return { tx: cost.validOrder, kind: 'valid' }
  const fee = cost.providerFee
  if (fee.providerFeeAmount !== '0') {
    const token = cost.datatoken
    const sent = await approveWei(signer, undefined, signer.address, fee.providerFeeToken, token, fee.providerFeeAmount)
    await sent.wait()
  }
  const kind = cost.validOrder ? 'reused' : 'started'
  const sent = cost.validOrder
    ? await datatoken.reuseOrder(cost.datatoken, cost.validOrder, fee)
    : await datatoken.startOrder(cost.datatoken, environment.consumerAddress, 0, fee)
  await sent.wait()
  return { tx: sent.hash, kind, fee: fee.providerFeeAmount }
}

async function start(environment, seconds, orders) {
  const named = ({ did, serviceId }, tx) => ({ documentId: did, serviceId, ...(tx && { transferTxId: tx }) })
  const validUntil = Math.floor(Date.now() / 1000) + 300
  const costs = await ProviderInstance.initializeCompute(
    [named(given.dataset, orders.dataset)],
    named(given.algorithm, orders.algorithm),
    environment.id,
    validUntil,
    url,
    signer.address
  )
  told('initializeCompute', costs)
  const dataset = await order(given.dataset, costs.datasets[0], environment)
  const algorithm = await order(given.algorithm, costs.algorithm, environment)
  told('order', { dataset, algorithm })
  const jobs = await ProviderInstance.computeStart(
    url,
    signer,
    environment.id,
    named(given.dataset, dataset.tx),
    { ...named(given.algorithm, algorithm.tx), algocustomdata: { seconds } }
  )
  told('start', { jobs })
  return [jobs[0].jobId, { dataset: dataset.tx, algorithm: algorithm.tx }]
}

async function until(jobId, reached) {
  for (;;) {
    const [job] = await ProviderInstance.computeStatus(url, signer.address, jobId)
    if (reached(job) || job.dateFinished) return job
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}

async function jobs() {
  const environment = await look()
  const [first, orders] = await start(environment, 0, {})
  const done = await until(first, () => false)
  told('status', { job: done })
  for (const [index, result] of done.results.entries()) {
    const link = await ProviderInstance.getComputeResultUrl(url, signer, first, index)
    const { data } = await downloadFile(link, index)
    told('result', { name: result.filename, type: result.type, text: Buffer.from(data).toString() })
  }
  const [second] = await start(environment, 100, orders)
  told('running', { job: await until(second, (job) => job.status === 40) })
  told('stop', { jobs: await ProviderInstance.computeStop(given.dataset.did, signer.address, second, url, signer) })
  told('stopped', { job: await until(second, () => false) })
  // By the transaction that paid, instead of the id.
  told('agreement', { jobs: await ProviderInstance.computeStatus(url, signer.address, undefined, orders.dataset) })
  told('delete', { jobs: await ProviderInstance.computeDelete(given.dataset.did, signer, second, url) })
  told('deleted', { jobs: await ProviderInstance.computeStatus(url, signer.address, second) })
}

const task = { encrypt, jobs }[what]
task().catch((fault) => {
  console.error(fault)
  process.exitCode = 1
})
